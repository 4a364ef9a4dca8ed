"""``bench/cpu_turns.py`` on a case of a few rows, whose compiled competitor is the eager one."""

import json

import cpu_turns
import gpu_cases
import report_tables
from gpu_cases import Case


def test_it_writes_what_the_page_reads(monkeypatch, tmp_path, capsys):
    competitors = gpu_cases.competitors

    def without_compiling(case, inputs):
        makers = competitors(case, inputs)
        return makers | {"compiled": makers["eager"]}

    monkeypatch.setattr(gpu_cases, "competitors", without_compiling)
    monkeypatch.setattr(cpu_turns, "CASES", (Case("forward+backward", 32, "float32", rows=48, width=8),))
    path = tmp_path / "turns.json"
    monkeypatch.setattr("sys.argv", ["cpu_turns.py", "--json", str(path)])
    cpu_turns.main()
    raw = json.loads(path.read_text())
    assert raw["turns"] == [json.loads(capsys.readouterr().out)]
    assert raw["turns"][0]["ours, ms"] > 0
    assert raw["turns"][0]["times as fast as"].keys() == {"eager", "compiled"}
    assert "| M=48, N=32, D=8, float32 | random |" in report_tables.turns(raw)

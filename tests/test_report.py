"""``bench/report.py``: the pages say what the committed results say, and a GPU's results fill tables and plots."""

import json
import shutil
from contextlib import contextmanager

import gpu
import gpu_report
import pytest
import records
import report
import report_plots
import report_tables
from gpu_cases import Case
from gpu_info_nce import InfoNceCase
from PIL import Image

ROOT = report.machine.ROOT


def test_the_pages_match_the_results():
    assert report.Report().stale() == [], "run: python bench/report.py"


# ------------------------------------------------------------------------------------------------ results of our own


def result(ms, **more):
    return {"status": "ok", "ms": ms, "extra_mib": 10 * ms, "tflops": 1 / ms, "host_ms": 0.1} | more


def gpu_entry(case, **results):
    return gpu.entry(case, results)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the results of a GPU, and pages that show them."""
    absent, large = {"status": "skipped", "reason": "pip install flash-kmeans"}, {"status": "out of memory"}
    step = "forward+backward"
    cases = [
        gpu_entry(Case(step, n, "bfloat16"), ours=result(ms), eager=eager, matmul=result(ms / 12))
        for n, ms, eager in ((8192, 1.0, result(12.0)), (16384, 2.0, result(30.0)), (65536, 8.0, large))
    ]
    cases.append(gpu_entry(Case("assign", 8192, "bfloat16"), ours=result(0.5), **{"flash-kmeans": absent}))
    losses = {"ours": result(4.0), "vanilla": result(2.0), "inf-cl": result(10.0), "eager": result(40.0)}
    cases.append(gpu_entry(InfoNceCase(step, 4096, 512, "bfloat16"), **losses))
    info = {"op": "vqgan", "part": "training step", "images": 40, "detail": "256 px", "commit": "a" * 40}
    steps = [
        {"extra_info": info | {"competitor": "taming", "peak_mib": 30000.0}, "stats": {"median": 1.5}},
        {
            "extra_info": info | {"competitor": "fp32", "parts_ms": {"encoder": 30.0, "backward": 90.0}},
            "stats": {"median": 0.5},
        },
    ]
    raw = {
        "machine": {"gpu": "NVIDIA Test", "driver": "1.2", "torch": "2.11", "triton": "3.6", "commit": "b" * 40}
        | {"uncommitted_changes": True},
        "date": "2026-01-02T03:04:05+00:00",
        "matmul_8192_tflops": {"bfloat16": 700.0},
        "copy_tb_per_s": 4.0,
        "cases": cases,
        "benchmarks": steps,
        "targets": gpu_report.evaluate_targets(cases, "NVIDIA Test"),
    }
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "gpu-test.json").write_text(json.dumps(raw))
    (tmp_path / "docs").mkdir()
    sections = ("summary", "tables", "plots", "targets")
    text = "\n\n".join(f"<!-- bench:gpu-{name} -->\n<!-- /bench -->" for name in sections)
    (tmp_path / "docs" / "page.md").write_text(f"Before.\n\n{text}\n\nAfter.\n")
    (tmp_path / "README.md").write_text("<!-- bench:cpu-tables -->\nold\n<!-- /bench -->\n")
    return tmp_path


@contextmanager
def results_of(checkout):
    """The results of the GPU, to be changed."""
    path = checkout / "bench" / "results" / "gpu-test.json"
    raw = json.loads(path.read_text())
    yield raw
    path.write_text(json.dumps(raw))


def document_of(checkout):
    return records.load(checkout / "bench" / "results" / "gpu-test.json")


def rows(text, start):
    """The cells of the first table row that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_of_a_gpu_fill_tables_and_plots(checkout, capsys):
    assert report.main(["--root", str(checkout), "--check"]) == 1
    assert "old" in (checkout / "README.md").read_text()
    assert "README.md differs" in capsys.readouterr().out
    assert report.main(["--root", str(checkout)]) == 0
    assert report.main(["--root", str(checkout), "--check"]) == 0

    text = (checkout / "docs" / "page.md").read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    told = (
        "NVIDIA Test, driver 1.2, torch 2.11, triton 3.6; 2026-01-02; commits aaaaaaa, bbbbbbb with uncommitted changes"
    )
    assert f"{told} ([JSON](../bench/results/gpu-test.json))." in text
    # Ours at the largest size where it has a time, against a baseline that ran out of memory there.
    what = "`vector_quantize`, forward+backward, M = 10240, N = 65536, D = 256, bfloat16"
    assert rows(text, what)[1:] == ["8.00", "- (eager)", "- (eager)", "-", "80.0"]
    what = "forward+backward, M = 10240, N = 8192, D = 256, bfloat16"
    assert rows(text, what)[1:] == ["1.00", "12.0 x", "120", "10.0", "1.00", "50 %"]
    assert rows(text, "forward+backward, M = 10240, N = 65536")[2] == "out of memory"
    assert rows(text, "assign, M = 10240, N = 8192")[2] == "skipped"
    contrast = rows(text, "forward+backward, B = 16, L = 4096, C = 512, bfloat16")
    assert contrast[1:4] == ["4.00", "10.0 x", "5.0 x"]  # inf-cl is compared with ours without weights
    assert "slower, or takes more memory, than a peer: nowhere." in text
    assert rows(text, "fp32")[1:] == ["500", "3.0 x", "-"]
    target = rows(text, "forward+backward, N=8192, bfloat16 | of the matmul rate, 7 products")
    assert target[2:] == ["at least 0.6", "0.583", "**missed**"]
    assert report.NO_CPU in (checkout / "README.md").read_text()

    plots = sorted(path.name for path in (checkout / "docs" / "pictures").iterdir())
    assert plots == [f"bench-gpu-test-{kind}.png" for kind in ("memory", "roofline", "speed-up", "step")]
    for name in plots:
        assert f"](../docs/pictures/{name})" in text
        with Image.open(checkout / "docs" / "pictures" / name) as image:
            assert image.width > 400


def test_baselines_of_another_gradient_are_labelled(checkout):
    label = 'baselines of `vector_quantize`: "hard" codebook gradient (ours: "soft"), noise sampled for all rows'
    assert label not in report_tables.source(document_of(checkout), 1)
    with results_of(checkout) as raw:
        for case in raw["cases"]:
            case.pop("codebook_grad", None)
    assert label in report_tables.source(document_of(checkout), 1)


def test_the_study_of_quantizers_is_a_table_and_curves(checkout):
    page = checkout / "docs" / "quantizers.md"
    page.write_text("<!-- bench:study-photos -->\n<!-- /bench -->\n")
    report.main(["--root", str(checkout)])
    assert report.NO_STUDY in page.read_text()
    results = checkout / "results" / "photos-tiny"
    results.mkdir(parents=True)
    (results / "quantizers.md").write_text("# Quantizers\n\n| a |\n| --- |\n| 1 |\n\n3 seeds.\n")
    assert "docs/quantizers.md" in report.Report(checkout).stale()
    report.main(["--root", str(checkout)])
    text = page.read_text()
    assert "-->\n| a |\n" in text
    assert "3 seeds. ([the numbers of each run](../results/photos-tiny/quantizers.csv))" in text
    assert "![curves](../results/photos-tiny/quantizers-curves.png)" in text


def test_where_a_peer_is_better_is_said(checkout):
    with results_of(checkout) as raw:
        raw["cases"][0]["results"]["eager"] |= {"ms": 0.5, "extra_mib": 9.0}
    text = report_tables.full(document_of(checkout), 1)
    what = "`vector_quantize`, forward+backward, M = 10240, N = 8192, D = 256, bfloat16"
    assert f"than a peer:\n\n- {what}: eager is 2.00 x as fast, takes 0.90 of the memory" in text


def test_where_a_step_takes_more_memory_is_said(checkout):
    with results_of(checkout) as raw:
        raw["benchmarks"][1]["extra_info"]["peak_mib"] = 60000.0
    text = report_tables.full(document_of(checkout), 1)
    step = "VQ-GAN with discriminator, training step, B = 40, 256 px"
    assert f"than a peer:\n\n- {step}: taming takes 0.50 of the memory" in text


def test_what_was_not_measured_is_said(checkout):
    with results_of(checkout) as raw:
        raw["not_measured"] = {"a": "out of time", "b": "out of time"}
        failed = {"status": "failed", "seconds": 17.3, "measured": 0, "told": ["FAILED x.py::y - no kernels", "z"]}
        raw["parts"] = {"bench/x.py": failed, "bench/done.py": failed | {"status": "done", "measured": 3}}
    text = report_tables.full(document_of(checkout), 1)
    assert text.endswith("- out of time: a; b\n- `bench/x.py` failed after 17 s, FAILED x.py::y - no kernels")


def test_another_number_makes_pages_and_plots_stale(checkout):
    report.main(["--root", str(checkout)])
    with results_of(checkout) as raw:
        raw["cases"][0]["results"]["eager"]["ms"] = 24.0
    assert report.Report(checkout).stale() == ["docs/page.md", "docs/pictures/bench-gpu-test-speed-up.png"]
    shutil.rmtree(checkout / "docs" / "pictures")
    assert len(report.Report(checkout).stale()) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:gpu-tables -->\nno end", "needs its <!-- /bench -->"),
        ("<!-- bench:gpu-tables --><!-- /bench -->", "on lines of their own"),
        ("<!-- bench:gpu-tabels -->\n<!-- /bench -->", "gpu-tabels -->: no such section"),
    ],
)
def test_a_broken_marker_is_refused(checkout, text, message):
    (checkout / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.Report(checkout).stale()


def test_a_file_that_holds_no_benchmarks_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="has neither benchmarks nor cases"):
        records.load(tmp_path / "other.json")
    assert records.load_all(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0, "0"),
        (0.01234, "0.0123"),
        (9.996, "10.00"),
        (34.56, "34.6"),
        (1028.6, "1029"),
    ],
)
def test_numbers(value, text):
    assert report_tables.number(value) == text


def test_plots_of_a_sweep_need_two_sizes(checkout):
    with results_of(checkout) as raw:
        raw["cases"] = raw["cases"][:1]
    kinds = {name.rsplit("test-", 1)[1] for name in report_plots.plots_of(document_of(checkout))}
    assert kinds == {"roofline.png", "step.png"}


def test_the_channels_of_a_contrastive_case_are_no_rows_width():
    info = {"op": "weighted_info_nce", "part": "forward", "dtype": "float32", "images": 1, "length": 64, "width": 8}
    entry = {"extra_info": info | {"competitor": "ours"}, "stats": {"median": 0.25}}
    record = records.from_benchmark(entry)
    assert (record.size, record.ms) == ("B = 1, L = 64, C = 8, float32", 250.0)


def test_an_assignment_is_an_op_of_its_own():
    info = {"op": "vector_quantize", "part": "assign", "dtype": "float32", "rows": 4, "codes": 2, "width": 8}
    record = records.from_benchmark({"extra_info": info | {"competitor": "ours"}, "stats": {"median": 0.25}})
    assert record.op == "assign_codes"

"""``bench/step_memory.py``: what a step takes is measured, and its table has a row for each of the flags."""

import report_tables
import step_memory
import torch

from regvq_fast.config import override


def test_a_step_is_measured_with_its_flags(monkeypatch):
    monkeypatch.setattr(step_memory, "MODEL", override(step_memory.MODEL, batch_size=2, image_size=32, ch=8))
    threads = torch.get_num_threads()
    try:
        found = [step_memory.measure("cpu", flags) for flags in (step_memory.FLAGS[""], {"accumulate": 2})]
    finally:
        torch.set_num_threads(threads)
    assert min(found) > 0


def test_the_table_knows_every_flag():
    machine = {"cpu": "Test", "cores": 2, "torch": "2.13", "commit": "a" * 40}
    raw = {"machine": machine, "date": "2026-01-02", "mib": dict.fromkeys(step_memory.FLAGS, 7)}
    lines = report_tables.step_memory(raw).splitlines()
    assert len(lines) == 2 + len(step_memory.FLAGS) + 2
    assert lines[-1] == "Test, 2 cores, torch 2.13; 2026-01-02; commit aaaaaaa."

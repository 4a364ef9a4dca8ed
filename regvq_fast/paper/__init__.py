"""The paper's tables and sweeps: ``regvq paper`` runs each of their rows from training to metrics."""

from regvq_fast.paper.driver import PaperConfig, reproduce
from regvq_fast.paper.experiments import EXPERIMENTS
from regvq_fast.paper.rows import Experiment, Row

__all__ = ["EXPERIMENTS", "Experiment", "PaperConfig", "Row", "reproduce"]

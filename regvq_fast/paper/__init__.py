"""The paper's tables and sweeps, each row of them from training to metrics: what ``regvq paper`` runs."""

from regvq_fast.paper.driver import PaperConfig, reproduce
from regvq_fast.paper.experiments import EXPERIMENTS
from regvq_fast.paper.rows import Experiment, Row

__all__ = ["EXPERIMENTS", "Experiment", "PaperConfig", "Row", "reproduce"]

"""Training: the loop, its schedules, and the state that a stopped run goes on from."""

from mechint.train.loop import resume, train
from mechint.train.signals import Stopped

__all__ = ["Stopped", "resume", "train"]

"""Training: the loop, its schedules, and the state that a stopped run goes on from."""

from mechint.train.loop import resume, train

__all__ = ["resume", "train"]

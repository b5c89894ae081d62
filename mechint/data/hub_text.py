"""Texts streamed from a data set on the Hugging Face Hub."""

import gc
import time
from collections.abc import Generator
from typing import Any

from mechint.config import DATASET_ALIASES
from mechint.data.documents import Document, content_of, without_blanks
from mechint.data.local_text import OTHER_SOURCES
from mechint.errors import MechintError, one_line
from mechint.models.resolve import check_repo, hub_unreachable

# A thread of Arrow that still reads when Python ends aborts the process (apache/arrow issue 45214; seen once, with
# pyarrow 26). Nothing tells when its threads are done; the datasets library sleeps too where it ends several streams.
SECONDS_TO_END = 0.5


class HubTexts:
    """Streams one split, unshuffled, so that the position in it can be recorded and resumed exactly.

    The revision is resolved to a commit once, and everything is read from that commit.
    """

    by_rank = True

    def __init__(
        self,
        dataset: str,
        split: str,
        revision: str | None,
        text_field: str,
        max_chars: int,
        rank: int,
        world_size: int,
        state: dict[str, Any] | None,
    ):
        name, _, config = dataset.partition(":")
        self.dataset, self.split, self.text_field, self.max_chars = dataset, split, text_field, max_chars
        self.name = DATASET_ALIASES.get(name, name)
        # One question first: an unreachable Hub would cost the library half a minute of retries.
        hub = check_repo(self.name, "dataset", revision)
        if not hub.online:
            raise hub_unreachable(f"data set {dataset}", "--dataset", "FILE.txt (or .jsonl, .parquet)", "builtin/tales")
        self.commit = hub.sha
        self.stream = _open_stream(self.name, config or None, split, self.commit)
        if world_size > 1:
            from datasets.distributed import split_dataset_by_node

            self.stream = split_dataset_by_node(self.stream, rank, world_size)
        self._next = 0
        if state is not None:
            self.stream.load_state_dict(state["stream"])
            self._next = state["next"]
        self._texts: Generator[Document] | None = None

    def read(self, start: int, count: int) -> list[Document]:
        if start < self._next:
            raise AssertionError(f"text {start} of {self.name} was already passed; the next is {self._next}")
        found: list[Document] = []
        try:
            if self._texts is None:
                self._texts = self._all()
            for text in self._texts:
                self._next += 1
                if self._next > start:
                    found.append(text)
                if self._next >= start + count:
                    break
        except MechintError:
            self.close()
            raise
        except Exception as error:  # whatever the network, the storage or the file format came up with
            self.close()
            raise MechintError(
                f"reading {self.name} from the Hub failed ({type(error).__name__}: {one_line(error, 160)}):"
                " run the same command again to go on from here"
            ) from error
        return found

    def _all(self) -> Generator[Document]:
        where = f"data set {self.name}"
        contents = ((content_of(record, self.text_field, where), where) for record in self.stream)
        yield from without_blanks(contents, self.max_chars)

    def about(self) -> None:
        return None

    @property
    def said(self) -> str:
        return f"records of {self.name} on the Hub, split {self.split}; field {self.text_field}"

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "stream": self.stream.state_dict()}

    def describe(self) -> dict[str, Any]:
        return {
            "text_source": "hub",
            "dataset_name": self.dataset,
            "dataset_split": self.split,
            "dataset_revision": self.commit,
            "text_field": self.text_field,
            "text_unit": "record",
        }

    def fingerprint(self) -> str:
        return self.commit or ""

    def close(self) -> None:
        # An open stream keeps download threads alive, and with them the process.
        if self._texts is not None:
            self._texts.close()
            self._texts = None
            gc.collect()
            time.sleep(SECONDS_TO_END)


def _open_stream(name: str, config: str | None, split: str, commit: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True, revision=commit)
    except RuntimeError as error:
        if "script" in str(error):
            raise MechintError(
                f"data set {name} is a Python script, which the datasets library no longer runs: try --revision"
                f" refs/convert/parquet, or {OTHER_SOURCES}"
            ) from error
        raise _cannot_open(name, error) from error
    except ValueError as error:
        message = one_line(error, 250)
        if "config" in message.lower():
            message = f"{message}; write it after a colon, as in --dataset {name}:CONFIG"
        raise MechintError(f"data set {name}: {message}") from error
    except Exception as error:
        raise _cannot_open(name, error) from error


def _cannot_open(name: str, error: Exception) -> MechintError:
    return MechintError(
        f"data set {name} cannot be opened ({type(error).__name__}: {one_line(error, 160)}); {OTHER_SOURCES}"
    )

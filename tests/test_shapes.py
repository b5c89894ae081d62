"""What tests/shapes.py wraps: a shape in a signature that is not kept is an error, and nothing else is touched."""

import ast
import inspect

import jaxtyping
import pytest
import torch
from shapes import wrap

import mechint.sae.architectures.topk
from mechint.data.norms import outliers
from mechint.eval.one_pass import text_groups
from mechint.sae import StandardSAE


def test_wrong_shapes_and_kinds_are_errors():
    sae = StandardSAE(4, 8)
    with pytest.raises(jaxtyping.TypeCheckError):
        sae.decode(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(jaxtyping.TypeCheckError):
        outliers(torch.zeros(2, 3), 10.0)
    with pytest.raises(jaxtyping.TypeCheckError):  # a dataclass or tuple of shapes is checked where it is made
        wrapped('@dataclass\nclass A:\n    x: Float[Tensor, "n"]\n    y: Float[Tensor, "n"]')["A"](
            torch.zeros(2), torch.zeros(3)
        )


def wrapped(source: str) -> dict:
    head = "from dataclasses import dataclass\nfrom jaxtyping import Float, Int\nfrom torch import Tensor\n"
    names: dict = {}
    exec(compile(wrap(ast.parse(head + source)), "made.py", "exec"), names)
    return names


def test_only_what_names_a_shape_is_wrapped():
    made = wrapped(
        'def one(x: Float[Tensor, "n d"]): ...\n'
        'def other() -> tuple[Int[Tensor, "n"], int]: return torch.zeros(1), 1\n'
        "def plain(x: int): ...\n"
        "class A:\n"
        '    def method(self, *, x: Float[Tensor, "n d"] | None = None): ...\n'
        "    @property\n"
        '    def value(self) -> Float[Tensor, "n"]: return 3\n'
    )
    made["torch"] = torch
    for call in (
        lambda: made["one"](torch.zeros(3)),
        lambda: made["other"](),
        lambda: made["A"]().method(x=torch.zeros(3)),
        lambda: made["A"]().value,
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            call()
    assert not hasattr(made["plain"], "__wrapped__")
    made["A"]().method()


def test_the_package_is_wrapped_and_its_sources_are_as_they_were():
    assert hasattr(text_groups, "__wrapped__")
    source = inspect.getsource(mechint.sae.architectures.topk)
    assert "typechecker" not in source

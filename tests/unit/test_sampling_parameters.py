"""The table of sampling parameters, compared with what is declared by hand: contract, command line, OpenAI schemas."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main
from tandem_frontend.openai.common_params import CommonFields

from tandem.api.types.v1 import sampling_pb2
from tandem.cli.app import app
from tandem.cli.generate import Asked
from tandem.domain.generation import Sampling
from tandem.domain.sampling import PARAMETERS, PENALTIES, RECOMMENDED, SCALARS, Range, SamplingParameter

SAMPLING_PROTO = Path(__file__).parents[2] / "protos/tandem/api/types/v1/sampling.proto"


def test_the_contract_and_the_value_type_have_these_fields_and_logit_bias() -> None:
    assert [*SCALARS, "logit_bias"] == [field.name for field in fields(Sampling)]
    assert {*SCALARS, "logit_bias"} == {field.name for field in sampling_pb2.Sampling.DESCRIPTOR.fields}


def test_clients_can_set_each_of_them() -> None:
    options = {option.name for option in typer.main.get_command(app).commands["generate"].params}  # type: ignore[attr-defined]
    assert {*SCALARS} <= {field.name for field in fields(Asked)}
    assert {*SCALARS} <= options
    assert {*SCALARS} <= {*CommonFields.model_fields}


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda parameter: parameter.name)
def test_neutral_values_are_the_defaults_of_the_contract(parameter: SamplingParameter) -> None:
    comment = re.search(rf"((?:  //[^\n]*\n)+)  optional \w+ {parameter.name} = ", SAMPLING_PROTO.read_text())
    assert comment is not None
    default = re.search(r"Default (-?\d+)", comment[1])
    assert parameter.neutral == (None if default is None else float(default[1]))


def test_penalties_are_the_parameters_whose_name_says_so() -> None:
    assert set(PENALTIES) == {name for name in SCALARS if name.endswith("_penalty")}
    assert set(RECOMMENDED) < set(SCALARS)


@pytest.mark.parametrize(("value", "is_inside"), [(0, False), (1e-9, True), (2, True), (2.1, False), (math.nan, False)])
def test_range_without_its_lowest_value(value: float, is_inside: bool) -> None:
    assert (value in Range(0, 2, includes_lowest=False)) is is_inside
    assert (value in Range(0, 2)) is (is_inside or value == 0)

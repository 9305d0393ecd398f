"""The tables of docs/bitnet_v2.md are those of the records, and say what the records say."""

import math
from typing import Any
from xml.etree import ElementTree

import activations
import pytest
import tables
import torch
from torch import nn

from bitdistill.model.hadamard import hadamard_transform
from bitdistill.model.layers import BitLinear, TernarySpec


def model(variant: str, seed: int, perplexity: float, sst2: float) -> dict[str, Any]:
    """A record of study.py; four-bit states cost a tenth in perplexity and a point in accuracy."""
    states = {"as trained": (perplexity, sst2)} | dict.fromkeys(
        tables.STATES, (1.1 * perplexity, sst2 - 0.01)
    )
    return {
        "variant": variant,
        "seed": seed,
        "perplexity": {name: worse[0] for name, worse in states.items()},
        "sst2": {name: worse[1] for name, worse in states.items()},
    }


def cells(table: str) -> list[list[str]]:
    """Its lines below the head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_tables_in_the_docs_are_those_of_the_records() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    for name, body in tables.tables().items():
        assert tables.with_table(text, name, body) == text, (
            "run python benchmarks/bitnet_v2/tables.py --write"
        )


def test_differences_are_within_seeds() -> None:
    """A seed that the reference has not run gives no difference; the order is the study's."""
    records = [model("v2-a4", seed, 80.0 + 3 * seed, 0.75) for seed in (0, 1, 2)]
    records += [model("b158", 0, 79.0, 0.76), model("b158", 1, 80.0, 0.78)]
    assert cells(tables.from_scratch(records)) == [
        ["b158", "0, 1", "79.50 ± 0.71", "", "77.00 ± 1.41"],
        ["v2-a4", "0, 1, 2", "83.00 ± 3.00", "2.00 ± 1.41", "75.00 ± 0.00"],
    ]


def test_curves_are_those_of_the_first_seed_and_once_more_of_the_last_steps() -> None:
    def curve(*losses: float) -> dict[str, list[float]]:
        return {"step": [100.0 * (i + 1) for i in range(len(losses))], "loss": list(losses)}

    records = [
        model("b158", 1, 80.0, 0.7) | {"heldout": curve(*[9.0] * 10)},
        model("b158", 0, 80.0, 0.7) | {"heldout": curve(5.0, 4.5, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4, 3.3)},
        model("v2-a4", 1, 80.0, 0.7) | {"heldout": curve(5.0, 4.5, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4, 3.3)},
    ]
    drawn = tables.curves(records)
    assert drawn is not None
    texts = [node.text for node in ElementTree.fromstring(drawn).iter() if node.tag.endswith("}text")]
    assert texts.count("b158") == texts.count("v2-a4") == 2  # a legend for each chart
    losses = {float(text) for text in texts if text and text[0].isdigit() and "." in text}
    assert max(losses) <= 5.1  # nothing of seed 1
    assert {"400", "800"} <= set(texts)
    assert "850" in texts or "825" in texts  # only the second chart has so fine an axis
    assert tables.curves([]) is None


def test_the_drawing_in_the_docs_has_the_variants_on_file() -> None:
    found = tables.by_variant(tables.read_records("records/*.json"))
    drawn = ElementTree.parse(tables.ROOT / "curves.svg").getroot()
    texts = [node.text for node in drawn.iter() if node.tag.endswith("}text")]
    assert [text for text in texts if text in tables.VARIANTS] == 2 * list(found), (
        "run python benchmarks/bitnet_v2/tables.py --write"
    )


def test_states_have_a_column_each() -> None:
    found = cells(tables.low_bit_states([model("a4.8", 0, 100.0, 0.5)]))
    assert found == [
        ["a4.8, perplexity", "100.00", "110.00", "110.00", "110.00"],
        ["a4.8, SST-2", "50.00", "49.00", "49.00", "49.00"],
    ]


def test_outliers_are_averaged_over_seeds_by_base_factor_and_form() -> None:
    def record(base: str, first: float) -> dict[str, Any]:
        forms = [(1, 16, False), (1, 4, True), (8, 16, False), (8, 4, True)]
        return {
            "model": f"benchmarks/bases/{base}",
            "rows": [
                {"factor": factor, "bits": bits, "hadamard": hadamard, "perplexity": first + i}
                for i, (factor, bits, hadamard) in enumerate(forms)
            ],
        }

    table = tables.outliers([record("small", 10.0), record("large", 5.0), record("small", 12.0)])
    assert table.splitlines()[0] == "| base, outliers | A16 | A4, Hadamard |"
    assert cells(table) == [
        ["small, x 1", "11.00 ± 1.41", "12.00 ± 1.41"],
        ["small, x 8", "13.00 ± 1.41", "14.00 ± 1.41"],
        ["large, x 1", "5.00", "6.00"],
        ["large, x 8", "7.00", "8.00"],
    ]


def test_answers_in_the_engine_stand_beside_those_in_torch() -> None:
    record = {"variant": "v2-a4", "seed": 1, "perplexity": {"fp32": 79.5, "int4": 90.0}}
    record["accuracy"] = {"fp32": 0.5, "int4": 0.25}
    others = [model("v2-a4", 0, 1.0, 0.0), model("v2-a4", 1, 80.0, 0.75), model("b158", 1, 2.0, 0.0)]
    assert cells(tables.in_engine([record], others)) == [
        ["v2-a4, seed 1, perplexity", "80.00", "79.50", "88.00", "90.00"],
        ["v2-a4, seed 1, SST-2", "75.00", "50.00", "74.00", "25.00"],
    ]


def test_activations_have_a_line_for_each_form() -> None:
    row = {"site": "o_proj", "peak": 3.21, "channel": 2.0, "error of 8 bits": 0.0125, "error of 4 bits": 0.2}
    record = {"model": "m", "rows": [{"hadamard": False, **row}, {"hadamard": True, **row}]}
    values = ["3.2", "2.0", "1.2", "20.0"]
    assert cells(tables.activations([record])) == [["m, o_proj", *values], ["m, o_proj, Hadamard", *values]]


def test_measures_of_inputs_are_those_of_their_definitions() -> None:
    """One outlier among zeros: it is the peak, 8 bits have it exactly, 4 bits clip it, the transform spreads it."""
    x = torch.zeros(3, 16)
    x[:, 5] = 2.0
    plain, spread = activations.Inputs(), activations.Inputs()
    plain.add(x)
    spread.add(hadamard_transform(x, 16))
    step = 2.0 / 16 / math.sqrt(7)  # mean|x| / sqrt(7), of which 4 bits hold seven
    assert plain.means() == pytest.approx(
        {"peak": 4.0, "channel": 16.0, "error of 8 bits": 0.0, "error of 4 bits": 1 - 7 * step / 2.0},
        abs=1e-6,
    )
    # All are of size 0.5 then: sqrt(7) steps, which round to three.
    assert spread.means() == pytest.approx(
        {"peak": 1.0, "channel": 1.0, "error of 8 bits": 0.0, "error of 4 bits": 3 / math.sqrt(7) - 1},
        abs=1e-6,
    )


@pytest.mark.parametrize("block", [0, 1, 8])
def test_inputs_are_measured_behind_the_norm_and_before_the_transform(block: int) -> None:
    linear = BitLinear(8, 4, bias=False, spec=TernarySpec(), norm_eps=1e-6, hadamard_block=block)
    with activations.measured(nn.ModuleDict({"o_proj": linear})) as found:
        linear(1e3 * torch.eye(8)[None])
    (plain,), (transformed,) = found["o_proj", False], found["o_proj", True]
    assert plain.tokens == transformed.tokens == 8
    assert plain.means()["peak"] == pytest.approx(math.sqrt(8))
    assert transformed.means()["peak"] == pytest.approx(1.0)
    assert torch.as_tensor(plain.magnitude).mean() == pytest.approx(math.sqrt(8), rel=1e-5)  # normed


def test_nothing_on_file_is_said() -> None:
    assert {tables.from_scratch([]), tables.low_bit_states([]), tables.outliers([])} == {tables.NOTHING}


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="no marks"):
        tables.with_table("text", "outliers", "body")

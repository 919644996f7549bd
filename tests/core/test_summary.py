"""The table of a quantized model."""

from __future__ import annotations

from gaq.model.summary_table import SummaryRow, format_rows


def row(name: str, size: int, irreps: str = "8x0e -> 8x0e", status: str = "rounded") -> SummaryRow:
    return SummaryRow(name, irreps, "8", "l=0: 16 bits", "0.001 to 0.002", size, status)


def test_rows_are_aligned_and_added_up() -> None:
    text = format_rows([row("embedding", 1000), row("interactions.0.linear_up", 234, status="in training")])
    header, rule, *rows, total = text.splitlines()
    assert header.split() == ["module", "irreps", "weights", "expected", "inputs", "scales", "bytes", "status"]
    assert set(rule) == {"-"}
    assert len(rows) == 2
    assert total.split() == ["total", "1234"]
    for title, cell in (("irreps", "8x0e -> 8x0e"), ("inputs", "l=0: 16 bits"), ("scales", "0.001 to 0.002")):
        assert [line.index(cell) for line in rows] == [header.index(title)] * 2
    assert rows[0].endswith("rounded")
    assert rows[1].endswith("in training")
    assert header.index("bytes") == rows[0].index("1000") == total.index("1234")
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_long_cells_are_shortened_but_not_the_reason() -> None:
    reason = "float: " + "a long reason " * 6
    text = format_rows([row("readout", 1, irreps="+".join(["128x0e"] * 12), status=reason)])
    (line,) = [line for line in text.splitlines() if line.startswith("readout")]
    assert "..." in line
    assert reason.strip() in line
    assert "+".join(["128x0e"] * 12) not in line
    exact = "x" * 48
    assert exact in format_rows([row("readout", 1, irreps=exact)])
    assert "x" * 45 + "..." in format_rows([row("readout", 1, irreps=exact + "x")])


def test_a_model_without_rows_has_a_header_and_a_total() -> None:
    assert format_rows([]).splitlines()[-1].split() == ["total", "0"]

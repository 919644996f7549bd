"""Runs each test with every installed framework; models that the tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from case import Case, case_of, installed

if not installed():
    collect_ignore = ["test_conformance.py"]


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "ignore:.*TorchScript type system.*:UserWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.*:UserWarning",
        "ignore:Found `per_type_energy.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


REQUESTS: dict[str, Callable[[Case], Iterable[str]]] = {
    "variant": lambda case: case.variants,
    "suffix": lambda case: case.forms,
    "checked_suffix": lambda case: [suffix for suffix, form in case.forms.items() if form.checked],
}
"""What a test may request besides a framework, by the name of its argument."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test with each installed framework, and with each variant or file form that it requests."""
    request = next((name for name in REQUESTS if name in metafunc.fixturenames), None)
    if request is not None:
        rows = [(name, value) for name in installed() for value in REQUESTS[request](case_of(name))]
        metafunc.parametrize(("case", request), rows, indirect=["case"], scope="session")
    elif "case" in metafunc.fixturenames:
        metafunc.parametrize("case", installed(), indirect=True, scope="session")


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    before = torch.get_default_dtype()
    current = case_of(request.param)
    current.start()
    yield current
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def models(case: Case) -> Any:
    from models import Models

    return Models(case.build, torch.float32)


@pytest.fixture(scope="session")
def trained_file(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained float model in a file of its framework; do not write to it."""
    return case.write_trained(tmp_path_factory.mktemp(f"{case.name}_trained"))


@pytest.fixture(scope="session")
def trained_quantized(trained_file: Path) -> Callable[..., Any]:
    """``trained_quantized(preset, status)``: a fresh quantized copy of the trained model, in float32."""
    import copy

    import trained
    from small import without_distillation

    import gaq

    made: dict[str, Any] = {}

    def get(preset: str, status: str = "converted") -> Any:
        if preset not in made:
            model = gaq.prepare(gaq.load(trained_file), without_distillation(preset))
            made[preset] = gaq.calibrate(model, trained.ethanol("::10"), progress=False)
        model = copy.deepcopy(made[preset])
        return model if status == "training" else gaq.convert(model)

    return get


@pytest.fixture(scope="session")
def saved(
    trained_quantized: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """``saved(preset, suffix)``: a file of the trained model; do not write to it."""
    import gaq

    folder = tmp_path_factory.mktemp("saved")
    made: dict[tuple[str, str], Path] = {}

    def get(preset: str, suffix: str) -> Path:
        if (preset, suffix) not in made:
            path = folder / f"{len(made)}{suffix}"
            gaq.save(trained_quantized(preset), path)
            made[preset, suffix] = path
        return made[preset, suffix]

    return get

"""How OpenMP's threads wait in the binary: shortly, unless the user says otherwise."""

import pytest

from binary import environment, mixtral


def openmp_settings(**variables: str) -> str:
    """What OpenMP says of itself when the binary starts."""
    kept = {name: value for name, value in environment().items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = mixtral("--version", env={**kept, "OMP_DISPLAY_ENV": "verbose", **variables})
    assert run.returncode == 0 and run.stdout.startswith(b"mixtral ")
    return run.stderr.decode()


def test_threads_soon_fall_asleep():
    assert "GOMP_SPINCOUNT = '1000'" in openmp_settings()


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
def test_the_users_choice_stays(variables, setting):
    settings = openmp_settings(**variables)
    assert setting in settings and "GOMP_SPINCOUNT = '1000'" not in settings

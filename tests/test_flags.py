"""The truth table, and the rule that a flag has one reader."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import discobeta
from discobeta.config import RunConfig
from discobeta.errors import UserError
from discobeta.flags import ARMS, FLAGS, Arm, arms_of, grid

PACKAGE = Path(discobeta.__file__).parent
READERS = {
    "add_disco_head": {"flags.py", "config.py", "heads.py"},
    "add_beta_head": {"flags.py", "config.py", "heads.py"},
    "disco_pref": {"flags.py", "config.py", "signals.py"},
    "use_dynamic_beta": {"flags.py", "config.py", "signals.py"},
}


def test_the_grid_is_the_table_of_the_design():
    cells = grid()
    assert len(cells) == 48
    count = Counter((cell.stage, cell.status) for cell in cells)
    assert count == {
        ("rm", "run"): 3, ("rm", "same-as"): 6, ("rm", "refused"): 7,
        ("dpo", "run"): 9, ("dpo", "refused"): 7,
        ("ppo", "run"): 9, ("ppo", "refused"): 7,
    }  # fmt: skip
    assert len({(c.stage, c.add_disco_head, c.disco_pref, c.add_beta_head, c.use_dynamic_beta) for c in cells}) == 48


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((False, False, False, False), "baseline"),
        ((True, False, False, False), "disco-idle_beta-absent"),
        ((True, True, False, False), "disco-used_beta-absent"),
        ((False, False, True, False), "disco-absent_beta-idle"),
        ((True, False, True, True), "disco-idle_beta-used"),
        ((True, True, True, True), "disco-used_beta-used"),
    ],
)
def test_arm_names(flags, name):
    arm = Arm.from_flags(*flags)
    assert arm.name == name and Arm.from_name(name) == arm and tuple(arm.flags.values()) == flags


@pytest.mark.parametrize("use, add", [("disco_pref", "add_disco_head"), ("use_dynamic_beta", "add_beta_head")])
def test_use_without_head_is_refused_and_both_flags_are_named(use, add):
    with pytest.raises(UserError, match=f"{use}.*{add}"):
        Arm.from_flags(**{use: True})
    with pytest.raises(UserError, match=f"{use}.*{add}"):
        RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "m", use: True})
    refused = [c for c in grid() if getattr(c, use) and not getattr(c, add)]
    assert len(refused) == 12 and all(c.status == "refused" and c.arm is None for c in refused)


def test_the_twin_of_an_arm_lacks_its_idle_heads():
    twins = {arm.name: arm.twin.name for arm in ARMS if arm.is_idle}
    assert twins == {
        "disco-idle_beta-absent": "baseline",
        "disco-absent_beta-idle": "baseline",
        "disco-idle_beta-idle": "baseline",
        "disco-idle_beta-used": "disco-absent_beta-used",
        "disco-used_beta-idle": "disco-used_beta-absent",
    }


def test_a_reward_model_knows_no_beta():
    assert [arm.name for arm in arms_of("rm")] == ["baseline", "disco-idle_beta-absent", "disco-used_beta-absent"]
    assert Arm.from_name("disco-used_beta-used").trained_as("rm").name == "disco-used_beta-absent"


def names_in(tree: ast.AST):
    """Every way in which source code can mention a flag: a name, an attribute, a keyword, a whole string."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
                yield name
            case ast.Constant(value=str(name)):
                yield name


def readers_of(flag: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if flag in names_in(ast.parse(path.read_text(encoding="utf-8")))
    }


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_is_read_by_its_one_reader(flag):
    found = readers_of(flag)
    assert found <= READERS[flag], f"{flag} is read in {sorted(found - READERS[flag])}"
    assert READERS[flag] - {"config.py", "flags.py"} <= found


def test_stages_and_losses_ask_no_arm_for_its_state():
    """Reading `arm.disco` or `arm.is_idle` would be reading a flag by another name."""
    for path in [PACKAGE / "losses.py", PACKAGE / "loop.py", PACKAGE / "evaluate.py", *PACKAGE.glob("stages/*.py")]:
        mentioned = set(names_in(ast.parse(path.read_text(encoding="utf-8"))))
        assert not mentioned & {"is_idle", "twin", "State", "Use", "absent", "idle", "used", *FLAGS}, path

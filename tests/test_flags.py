"""The truth table, and the rule that a flag has one reader."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import discobeta
from discobeta.design.arms import ARMS, FLAGS, IDEAS, Arm, arms_of, grid
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError

PACKAGE = Path(discobeta.__file__).parent
TABLES = {"design/arms.py", "design/stages.py"}


def test_the_grid_is_the_table_of_the_design():
    cells = grid()
    assert len(cells) == 48
    count = Counter((cell.stage, cell.status) for cell in cells)
    assert count == {
        ("rm", "run"): 3, ("rm", "same-as"): 6, ("rm", "refused"): 7,
        ("dpo", "run"): 9, ("dpo", "refused"): 7,
        ("ppo", "run"): 9, ("ppo", "refused"): 7,
    }  # fmt: skip
    assert len({(c.stage, *(c.flags[flag] for flag in FLAGS)) for c in cells}) == 48


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
    arm = Arm.from_flags(**dict(zip(FLAGS, flags, strict=True)))
    assert arm.name == name and Arm.from_name(name) == arm and tuple(arm.flags.values()) == flags


@pytest.mark.parametrize("use, add", [("disco_pref", "add_disco_head"), ("use_dynamic_beta", "add_beta_head")])
def test_use_without_head_is_refused_and_both_flags_are_named(use, add):
    with pytest.raises(UserError, match=f"{use}.*{add}"):
        Arm.from_flags(**{use: True})
    with pytest.raises(UserError, match=f"{use}.*{add}"):
        RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": "m", use: True})
    refused = [c for c in grid() if c.flags[use] and not c.flags[add]]
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


def mentions(*names: str) -> set[str]:
    """Files of the package that mention one of these names in code."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if not set(names).isdisjoint(names_in(ast.parse(path.read_text(encoding="utf-8"))))
    }


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_stands_in_the_table_of_ideas_alone(flag):
    assert mentions(flag) == {"design/arms.py"}


def test_the_architecture_goes_to_heads_alone_and_the_use_to_signals():
    assert mentions("heads_in") == {"method/stage.py"}
    found = {
        name for name in mentions("used", "is_idle", "twin", *FLAGS) if not name.startswith(("design/", "report/"))
    }
    assert found == {"method/signals.py", "method/stage.py"}  # stage: do the inputs belong to the arm?


def test_stages_and_losses_ask_no_arm_for_its_state():
    """Reading `arm.state(...)` or `arm.is_idle` would be reading a flag by another name."""
    for path in [
        PACKAGE / "losses.py",
        *PACKAGE.glob("run/*.py"),
        *(PACKAGE / f"method/{stage}.py" for stage in STAGES),
    ]:
        mentioned = set(names_in(ast.parse(path.read_text(encoding="utf-8"))))
        assert not mentioned & {"is_idle", "twin", "State", "absent", "idle", "used", *FLAGS}, path


@pytest.mark.parametrize("stage", STAGES)
def test_no_module_asks_for_a_stage_by_its_name_but_its_own(stage):
    assert mentions(stage) <= {*TABLES, f"method/{stage}.py"}


@pytest.mark.parametrize("key", [idea.key for idea in IDEAS])
def test_no_module_asks_for_an_idea_by_its_key_but_its_head_and_its_signal(key):
    """As a text; `beta` is also an argument of a loss, and what other programs call pref_beta."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == key
    }
    assert found - {"design/config_names.py", "losses.py"} <= {*TABLES, "method/heads.py", "method/signals.py"}

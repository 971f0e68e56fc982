"""Every config in configs/ is planned: small slices and models here, the true ones if --slow."""

import json

import jax
import pytest
from flax import nnx

from tests.plan import published_models
from tests.plan.commands import REPOSITORY, STUDENT, run_commands, write_config
from uld_jax import config as configs
from uld_jax.models import Policy, abstract_decoder, load_config
from uld_jax.testing import tiny_gemma

CONFIGS = REPOSITORY / "configs"
# Config to the slice that its README row is about.
SLICES = {
    "paper/runs.py:llama,pythia-1b,squad": "v5e:4x4",
    "paper/runs.py:mistral,opt-350m,squad": "v5e:4x4",
    "paper/runs.py:llama,bloomz-560m,squad": "v5e:4x4",
    "paper/runs.py:llama,mt0-base,squad": "v5e:4x4",
    "pods/runs.py:llama": "v5e:16x16",
    "pods/runs.py:qwen_to_gemma": "v5e:16x16",
}
SMALL = (
    "quickstart.py",
    "paper/runs.py:llama,pythia-1b,squad",
    "pods/runs.py:llama",
    "experiments/runs.py:distance,hybrid",
)


def last_name(group):
    """Of a model, without its owner's."""
    return group.source.split("/")[-1]


def plan_of(name, topology, root, *flags, layers=None):
    """The plan of a shipped config, its models being nothing but a config.json."""
    config = configs.load(f"{CONFIGS / name}")
    sources = [
        f"--config.{path}.source={published_models.write(last_name(group), root, layers=layers)}"
        for path, group in {"student": config.student, **config.teacher_groups()}.items()
    ]
    report = root / "plan.json"
    command = ["plan", f"--config={CONFIGS / name}", f"--topology={topology}", f"--json={report}"]
    result = run_commands({"plan": [*command, *sources, *flags]})["plan"]
    assert result["status"] == 0, result["err"]
    print(result["out"])
    [plan] = json.loads(report.read_text())["plans"]
    return plan


@pytest.mark.parametrize("name", sorted(published_models.MODELS))
def test_published_models_have_the_parameters_of_their_cards(tmp_path, name):
    config = load_config(published_models.write(name, tmp_path))
    model = abstract_decoder(config, Policy(), "bfloat16")
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count == pytest.approx(published_models.MODELS[name][1], rel=0.005)


def test_every_config_is_planned_in_small(tmp_path):
    for name, tiny in (("student", STUDENT), ("teacher", tiny_gemma(vocab_size=1024))):
        write_config(tiny, tmp_path / name)
    small = [
        "--topology=v5e:2x2",
        f"--config.student.source={tmp_path / 'student'}",
        f"--config.teacher.source={tmp_path / 'teacher'}",
        "--config.student.max_length=128",
        "--config.teacher.max_length=128",
        "--config.teacher.max_new_tokens=15",
        "--config.eval.max_new_tokens=15",
        "--config.data.batch_size=16",
        "--config.mesh.tensor=2",
    ]
    commands = {
        name: ["plan", f"--config={CONFIGS / name}", f"--json={tmp_path / str(i)}", *small]
        for i, name in enumerate(SMALL)
    }
    said = run_commands(commands)
    for i, name in enumerate(SMALL):
        assert said[name]["status"] == 0, said[name]["err"]
        [plan] = json.loads((tmp_path / str(i)).read_text())["plans"]
        assert plan["fits"]
        assert plan["mesh"]["tensor"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLICES))
def test_a_config_fits_its_slice(tmp_path, name):
    config = configs.load(f"{CONFIGS / name}")
    plan = plan_of(name, SLICES[name], tmp_path)
    assert plan["fits"]
    chips = plan["chips"]
    student, teacher = (
        published_models.MODELS[last_name(group).removesuffix("-deduped")][1]
        for group in (config.student, config.teacher)
    )
    # Rounded counts of the cards; norms, which every chip has whole, are left out.
    arithmetic = (2 * teacher + (4 + 8) * student) / chips
    kinds = ("teacher parameters", "student parameters", "optimizer state")
    assert sum(plan["bytes"][kind] for kind in kinds) == pytest.approx(arithmetic, rel=0.02)

"""The metrics of a generator before and after its training.

In: a registered generator and its data set. Out: a line of JSON on stdout with the metrics of the
network as it was initialized from the recipe's seed, and of the trained one, both on the same split
and with the recipe's judge.

    python benchmarks/initial_frechet.py models:/mnist-generation --data DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipelines.workflows.context import Context

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def initial_frechet(model: str, data: str, split: str = "test") -> dict[str, Any]:
    """The metrics `initial` and `trained` of `model`, their `judge`, and `share`: the trained
    Fréchet distance divided by the initial one."""
    import torch

    import models
    from pipelines.evaluation import job
    from pipelines.evaluation.payload import EvaluationPayload, ModelFiles
    from pipelines.interfaces import NullEmit, World
    from pipelines.training import checkpoints
    from pipelines.training.checkpoints import Progress
    from pipelines.training.run import JUDGE
    from pipelines.training.setup import data_spec
    from pipelines.workflows import model_reference, services, used_models

    registry = services.open_registry(Context.from_environment())
    version = model_reference.resolve(registry, model)
    with tempfile.TemporaryDirectory() as scratch:
        judge = Path(scratch) / JUDGE
        trained = registry.download(version, Path(scratch))
        loaded = checkpoints.read_model(trained, services.registered_digest(version))
        used_models.fetch_judge(loaded.recipe, registry, judge)
        torch.manual_seed(loaded.recipe.seed)  # as a training does
        family = models.get(loaded.recipe.family)
        module = family.build(loaded.recipe.config(), data_spec(loaded.recipe, loaded.card))
        fresh = checkpoints.save(
            Path(scratch) / "fresh",
            weights=module.state_dict(),
            training=None,
            optimizers={},
            recipe=loaded.recipe,
            card=loaded.card,
            progress=Progress(),
        )
        initial = Path(scratch) / "initial"
        digests = {initial: checkpoints.write_model(fresh, initial), trained: loaded.digest}
        metrics = {}
        for folder, digest in digests.items():
            files = ModelFiles(folder.name, folder, digest, judge)
            payload = EvaluationPayload((files,), data, split, intervals=False)
            (one,) = job.evaluate_models(payload, World(), NullEmit()).models
            metrics[folder] = {name: estimate.value for name, estimate in one.metrics.items()}
    return {
        "model": f"models:/{version.name}/{version.number}",
        "judge": loaded.recipe.judge,
        "split": split,
        "initial": metrics[initial],
        "trained": metrics[trained],
        "share": metrics[trained]["frechet"] / metrics[initial]["frechet"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a registered generator, models:/NAME/3")
    parser.add_argument("--data", required=True, help="the packed data set")
    parser.add_argument("--split", default="test", help="split to evaluate")
    options = parser.parse_args()
    print(json.dumps(initial_frechet(options.model, options.data, options.split)))


if __name__ == "__main__":
    main()

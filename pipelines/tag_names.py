"""Names of the tags that Tessera writes on MLflow runs and registered model versions.

In: nothing. Out: one constant a tag. Tag values are text; where a comment says JSON, the text is
JSON. Must not know who reads or writes them.
"""

from __future__ import annotations

# On runs and on model versions.
RUN = "tessera.run"  # name of the training run, which is the name of its folder
FAMILY = "tessera.family"
SEARCH = "tessera.search"  # name of the search that the run or version belongs to
TRIAL = "tessera.trial"  # id of the trial within that search

# On runs.
MODEL = "tessera.model"  # registered model that the run trains a version of
SETTINGS = "tessera.settings"  # JSON: every change of a population member's settings
TRIAL_STATUS = "tessera.trial.status"
TRIAL_REASON = "tessera.trial.reason"  # why the trial failed or was stopped
CACHE = "tessera.cache"  # where decoded images are kept: none, memory or device
HARDWARE = "tessera.hardware"
GROUP_SIZE = "tessera.group.size"  # number of workers now
GROUP_PREFIX = "tessera.group."  # + number of a change of the group: its sizes, seconds and reason
PYTHON = "tessera.python"
LIBRARY_PREFIX = "tessera.version."  # + name of a library: its version
RESTARTS = "tessera.restarts"  # JSON: each start from step 0 that repeated steps, and why
RESUMED_PREFIX = "tessera.resumed."  # + path of a setting: its value since a resume
RAY_JOB = "ray.job_id"
RAY_SUBMISSION = "ray.submission_id"
PROMOTION = "tessera.promotion"  # registered model that a promotion run decided about
PROMOTION_CANDIDATE = "tessera.promotion.candidate"  # version number
PROMOTION_CHAMPION = "tessera.promotion.champion"  # version number
PROMOTION_VERDICT = "tessera.promotion.verdict"  # yes or no
PROMOTION_OUTCOME = "tessera.promotion.outcome"

# On model versions.
DIGEST = "tessera.digest"  # sha256 of the manifest of the version's files
VARIANT = "tessera.variant"
RECIPE = "tessera.recipe"  # JSON
DATA_DIGEST = "tessera.data_digest"
DATA_NAME = "tessera.data_name"
CLASSES = "tessera.classes"  # JSON
PREPROCESSING = "tessera.preprocessing"  # JSON: the `DataSpec` without its classes
METRICS = "tessera.metrics"  # JSON: validation metrics, each with the prefix val/
CHECKPOINT = "tessera.checkpoint"  # folder name of the registered checkpoint
SERVABLE = "tessera.servable"  # MLflow flavour that serves the version, or "no: REASON"
COPIED_FROM = "tessera.copied_from"
EVALUATION_PREFIX = "tessera.evaluation."  # + name of a split, JSON
VERDICT = "tessera.verdict"  # JSON
DECISION = "tessera.decision"

# On the registered model that records the promotions of another, and on its versions.
RECORD_OF = "tessera.record_of"  # name of the other model
DECISION_PREFIX = "tessera.decision."  # + name of a field of a `Decision`

"""Student to rollout engine: gathered bucket by bucket, stamped with a version."""

from opd.faults import fault_point
from opd.types import WeightSource, WeightTarget


def push(student: WeightSource, rollout_engine: WeightTarget, version: int) -> int:
    """Replaces the rollout engine's weights by the student's and returns the version that it samples with from now on.

    Collective: under ZeRO-3 every rank gathers the same buckets and feeds its own engine. The engine resets its caches and
    stamps what it samples from now on with `version`; if the load fails halfway the version is not stamped.
    """
    fault_point("sync.before")
    rollout_engine.load_weights(student.checkpoint_tensors(), version)
    return rollout_engine.policy_version

"""`draftcache capture`: which processes do the job, how they are told to stop, and the line that shows all of them."""

from __future__ import annotations

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.local_workers import run_processes, worker_count
from draftcache.capture.job.progress import CaptureSummary, JobProgress
from draftcache.capture.job.stopping import StopSignals
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.store.common.stopping import StopRequest
from draftcache.store.storage.base import open_storage


def capture(config: CaptureConfig) -> CaptureSummary:
    """Run the job with the engine of the settings; returns when the store is whole. For the main thread.

    Raises Stopped after SIGTERM or SIGINT, and DraftcacheErrors. With several workers the caller's `__main__`
    is imported by each, as always with `spawn`: a script guards its calls by `if __name__ == "__main__"`.
    """
    stop = StopRequest(config.grace_seconds)
    workers = config.workers or worker_count(config.device, config.shard)
    if config.engine == "local" and workers == 1:
        with StopSignals(stop), CaptureJob(config) as job:
            return job.run(stop)
    with JobProgress(WorkPlan.of(config), open_storage(config.output)) as progress:
        if config.engine == "ray":
            from draftcache.capture.job.ray_workers import run_on_ray

            run_on_ray(config, progress, stop)
        else:
            run_processes(config, workers, progress, stop)
    return progress.summary()

"""Entry of the capture job: starts the worker processes, stops them on signals and shows one progress line."""

from __future__ import annotations

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.local_workers import run_processes, worker_count
from draftcache.capture.job.progress import CaptureSummary, JobProgress
from draftcache.capture.job.start_check import with_layers
from draftcache.capture.job.stopping import StopSignals
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.store.common.stopping import StopRequest
from draftcache.store.storage.base import open_storage


def capture(config: CaptureConfig) -> CaptureSummary:
    """Run the job with the launcher of the settings, in the main thread; returns when the store is whole.

    Raises Stopped after SIGTERM or SIGINT, and DraftcacheErrors. With several workers each one imports the caller's
    `__main__`, as always with `spawn`, so a script has to guard its calls by `if __name__ == "__main__"`.
    """
    config = with_layers(config)
    stop = StopRequest(config.grace_seconds)
    workers = config.workers or worker_count(config.device, config.tensor_parallel)
    if config.launcher == "local" and workers == 1:
        with StopSignals(stop), CaptureJob(config) as job:
            return job.run(stop)
    with JobProgress(WorkPlan.of(config), open_storage(config.output)) as progress:
        if config.launcher == "ray":
            from draftcache.capture.job.ray_workers import run_on_ray

            run_on_ray(config, progress, stop)
        else:
            run_processes(config, workers, progress, stop)
    return progress.summary()

"""One self-contained HTML page on runs, sweeps, evaluations and stores: no network, no script.

In reading order: `inputs` tells what was handed in and reads it, `runs` is a training run, `evaluations` the figures of
`draftcache eval`, `trials` the runs of a sweep, `conversations` tokens with their fates; `scales` and `charts` draw,
`sections` makes what each part of the page shows, and `render` fills the templates.
"""

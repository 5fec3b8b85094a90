"""The runs that finders of sets measure on."""

from dataclasses import dataclass

from dps_lens.scoring.clean_run import CleanRun


@dataclass(frozen=True)
class Trial:
    """The clean runs of one discovery example that finders measure on; made once, every prompt cached.

    Attributes:
        user_id: whose example.
        removed: own-profile runs, one per counterfactual, to be patched with its z: losing these heads (noising).
        restored: counterfactual runs, to be patched with the own run's z: bringing these heads (denoising).
        task: the same task without a profile, heads zeroed.
        neutral: neutral text, heads zeroed; None where it is not asked for.
    """

    user_id: str
    removed: tuple[CleanRun, ...]
    restored: tuple[CleanRun, ...]
    task: CleanRun
    neutral: CleanRun | None

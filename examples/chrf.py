"""chrF (Popović 2015): character n-grams that answer and reference share, by sacrebleu."""

from sacrebleu import sentence_chrf

import dps_lens as dps


def chrf(reference: str, text: str) -> float:
    """chrF2 of one answer, 0 to 100."""
    return sentence_chrf(text, [reference]).score


CHRF = dps.Metric("chrF", chrf, better="higher")

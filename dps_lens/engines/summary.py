"""What a run on several workers came to."""

from dataclasses import dataclass


@dataclass
class Summary:
    """Counts of one `make_units`.

    Attributes:
        units: made.
        quarantined: given up.
        again: handed out more than once.
        deaths: workers that died.
        seconds: from the first unit handed out to the last one in.
        busy: seconds that workers spent on units.
        idle: mean seconds between two units of a worker.
        workers: that made a unit.
    """

    units: int = 0
    quarantined: int = 0
    again: int = 0
    deaths: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    idle: float = 0.0
    workers: int = 0

    def __str__(self) -> str:
        rate = self.units / self.seconds if self.seconds else 0.0
        text = (
            f"{self.units} units on {self.workers} workers in {self.seconds:.0f} s ({rate:.2f} units/s, "
            f"{1000 * self.idle:.1f} ms between units)"
        )
        for count, what in ((self.deaths, "workers died"), (self.again, "units handed out again")):
            text += f", {count} {what}" if count else ""
        return text + (f", {self.quarantined} in quarantine" if self.quarantined else "")

"""Numbers of the paper's tables (arXiv 2604.22345), LLaMA-3-8B-Instruct."""

_ROUGES = ("ROUGE-1", "ROUGE-L", "METEOR")
_ACCURACIES = ("accuracy", "macro-F1")
_ERRORS = ("MAE", "RMSE")

_TABLES: dict[str, tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    "lamp-1": (
        _ACCURACIES,
        {"CAD": (0.6240, 0.6070), "DeCoRe": (0.6232, 0.6200), "DoLa": (0.6156, 0.5961), "DPS": (0.6356, 0.6288)},
    ),
    "lamp-2": (_ACCURACIES, {"CAD": (0.4552, 0.3839), "DeCoRe": (0.4639, 0.4034), "DPS": (0.4610, 0.3910)}),
    "lamp-3": (_ERRORS, {"CAD": (0.4426, 0.9300), "DoLa": (0.4200, 0.8718), "DPS": (0.4236, 0.9278)}),
    "lamp-4": (
        _ROUGES,
        {
            "CAD": (0.1681, 0.1498, 0.1568),
            "DeCoRe": (0.1768, 0.1572, 0.1626),
            "DoLa": (0.1694, 0.1508, 0.1592),
            "DPS": (0.1787, 0.1596, 0.1650),
        },
    ),
    "lamp-5": (
        _ROUGES,
        {
            "CAD": (0.3530, 0.3068, 0.3925),
            "DeCoRe": (0.4010, 0.3527, 0.4004),
            "DoLa": (0.3636, 0.3117, 0.4079),
            "DPS": (0.3243, 0.2787, 0.3826),
        },
    ),
    "lamp-7": (
        _ROUGES,
        {
            "CAD": (0.3368, 0.2893, 0.2813),
            "DeCoRe": (0.3231, 0.2764, 0.2729),
            "DoLa": (0.3365, 0.2877, 0.2795),
            "DPS": (0.3389, 0.2898, 0.2884),
        },
    ),
}

PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    task: {method: dict(zip(metrics, values, strict=True)) for method, values in rows.items()}
    for task, (metrics, rows) in _TABLES.items()
}
"""task → method → metric → value."""

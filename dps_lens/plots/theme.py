"""The look of every figure; a template that is passed on, never made global."""

import plotly.graph_objects as go

SIGNED = "RdBu"
"""Red below zero, blue above, as in TransformerLens and circuitsvis."""

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, those that are readable as lines first."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Helvetica, Arial, sans-serif", "size": 12, "color": "#222222"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 56, "r": 16, "t": 48, "b": 48},
        "title": {"x": 0.02, "xanchor": "left", "font": {"size": 14}},
        "xaxis": {"ticks": "outside", "ticklen": 3, "zeroline": False, "showgrid": False},
        "yaxis": {"ticks": "outside", "ticklen": 3, "zeroline": False, "showgrid": False},
        "hoverlabel": {"align": "left"},
    }
)

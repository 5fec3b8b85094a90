"""Words of users, models and files in figures."""

# Plotly reads tags (<b>, <a href>), entities, TeX between dollars and, in hover templates, %{…}; the entities below it
# shows as the letters they stand for, wherever it shows a text.
_LETTERS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "%": "&#37;", "\n": "⏎", "\r": "⏎"})


def plain(text: object) -> str:
    """A text as a figure shows it letter by letter: in titles, legends, ticks, annotations and on hover.

    >>> plain("<b>u_1</b>, %{x}")
    '&lt;b&gt;u_1&lt;/b&gt;, &#37;{x}'
    """
    return str(text).translate(_LETTERS)

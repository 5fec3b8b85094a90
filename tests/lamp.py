"""Small records in the published layouts of LaMP and LongLaMP."""

import json

LAMP = {
    "lamp-1": (
        'For an author who has written the paper with the title "Deep Bees", which reference is related? Just answer '
        'with [1] or [2] without explanation. [1]: "Wax" [2]: "Tax"',
        "[1]",
        {"title": "On Hives", "abstract": "We study hives."},
    ),
    "lamp-2": (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        "explanation. tags: [comedy, action] description: Two beekeepers race.",
        "comedy",
        {"tag": "action", "description": "A hive explodes."},
    ),
    "lamp-3": (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: The smoker leaks.",
        "2",
        {"text": "Lovely gloves.", "score": "5"},
    ),
    "lamp-4": (
        "Generate a headline for the following article: Bees returned to the town hall roof.",
        "Bees are back",
        {"title": "Honey down", "text": "The harvest was poor."},
    ),
    "lamp-5": (
        "Generate a title for the following abstract of a paper: We measure waggle dances.",
        "Waggle",
        {"title": "Combs", "abstract": "Hexagons are efficient."},
    ),
    "lamp-6": (
        "Generate a subject for the following email: Could you bring the ladder?",
        "Ladder",
        {"title": "Boots", "text": "My boots are in your shed."},
    ),
    "lamp-7": (
        "Paraphrase the following tweet without any explanation before or after it: bees!!!",
        "so many bees",
        {"text": "rain again"},
    ),
}
LONGLAMP = {
    "longlamp-abstract": (
        {
            "name": "a1",
            "input": 'Generate an abstract for the title "Bees" using the following items: wax.',
            "output": "We study bees.",
        },
        {"title": "Wax", "abstract": "Wax is made.", "year": 2001},
    ),
    "longlamp-review": (
        {
            "reviewerId": "r1",
            "input": 'Generate the review text written by a reviewer … product with description "veil".',
            "output": "Good veil.",
        },
        {"description": "smoker", "overall": "4.0", "reviewText": "It smokes well.", "summary": "Smokes"},
    ),
    "longlamp-topic": (
        {"author": "t1", "input": 'Generate the content for a reddit post "Swarm!".', "output": "They left at noon."},
        {"summary": "Queens", "content": "I found two queens today."},
    ),
}


def lamp_files(folder, task, *, wrapped=True, n=5):
    task_input, answer, fields = LAMP[task]
    profile = [{"id": f"p{i}", **{k: f"{v} ({i})" if k != "score" else v for k, v in fields.items()}} for i in range(n)]
    (folder / "dev_questions.json").write_text(json.dumps([{"id": "q1", "input": task_input, "profile": profile}]))
    golds = [{"id": "q1", "output": answer}]
    outputs = {"task": task.replace("lamp-", "LaMP_"), "golds": golds} if wrapped else golds
    (folder / "dev_outputs.json").write_text(json.dumps(outputs))
    return folder / "dev_questions.json"

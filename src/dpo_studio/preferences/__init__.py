"""TEXT: preference pairs from whatever people have, refused rows with their reasons, the split by prompt.

In the order data flows, each module importing only from those above it:

    pair.py      what a pair is
    files.py     one file -> its raw rows
    rows.py      a source's name (file, folder, Hub dataset, bundled pairs) -> numbered raw rows
    turns.py     the values of a row -> turns of a chat -> a checked pair
    formats.py   a raw row of a public shape -> a pair
    mapping.py   a raw row of any other shape -> a pair, by the user's own words
    sources.py   a source -> its pairs, and its refused rows with their reasons
    labelled.py  a source -> answers with what every annotator said, ties included
    split.py     pairs -> what is learned from and what is measured on
"""

"""Texts to token ids outside of the event loop: turns, threads, and processes for the longest texts.

    texts    what is done with a text, wherever it is done
    turns    so many at a time, the others in order
    pool     processes for long texts, started with the first of them
    process  one of them, as its frontend sees it
    __main__ the same from within

The modules are imported one by one: the process for long texts holds a tokenizer and next to nothing else.
"""

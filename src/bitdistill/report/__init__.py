"""Reports: a run folder in, one self-contained HTML page and one Markdown file out; no torch."""

"""Other engines for the whole-model benchmark, and how they are started, asked and fed; bench_model.py compares."""

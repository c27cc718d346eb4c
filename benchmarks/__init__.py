"""Speed and memory of vqkernels against its peers, each number behind a correctness gate.

Started with ``python -m benchmarks.run``; ``python -m benchmarks.report`` turns the results into tables and charts.
"""

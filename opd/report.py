"""`python -m opd.report RUN_DIR`: the report of a run that has finished, printed again."""

import sys

from opd.records.report import report_command

if __name__ == "__main__":
    sys.exit(report_command(sys.argv[1:]))

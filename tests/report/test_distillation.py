"""The report of a distillation must show the whole run and let nothing of the user's data act as markup."""

import re

import pytest
from report.test_selection import SCRIPT, Page

from hf_dissect.report.distillation import write_distillation_report

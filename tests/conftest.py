"""Hermes reads its home when it is imported: before that, give the tests one that is not the user's."""

from __future__ import annotations

import os

import pytest

from hermes_atropos.hermes.profile import use_training_profile

pytest.register_assert_rewrite("support")
use_training_profile()
os.environ["HF_HUB_OFFLINE"] = "1"

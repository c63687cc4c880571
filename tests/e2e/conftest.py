"""The program as a user runs it, on any number of processes, and what it is given to train on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .material import SHARED, Material, make_random, make_stories
from .program import Program


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """In models this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def program() -> Iterator[Program]:
    """Runs `megatron …` on processes that are kept between runs."""
    running = Program()
    yield running
    running.close()


@pytest.fixture(scope="package")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A random Llama with a tied embedding and an odd vocabulary, and English text in bytes."""
    return make_random(tmp_path_factory.mktemp("random-llama"))


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory, random_llama: Material) -> Material:
    """A trained Llama and real medical text, or where ../shared is absent the random one."""
    if not SHARED.is_dir():
        return random_llama
    return make_stories(tmp_path_factory.mktemp("stories"))

"""Ranks that share a console and end with the same sentence print it once."""

from datetime import timedelta

import torch.distributed as dist

from distattn.training.rank import is_first_to_print


def test_ranks_that_share_a_console_print_a_sentence_once():
    store = dist.HashStore()
    is_first = [is_first_to_print(text, store) for text in ("no GPU.", "no GPU.", "rank 1 has other data.", "no GPU.")]
    assert is_first == [True, False, True, False]


def test_a_lost_store_does_not_suppress_a_sentence():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    del server
    assert is_first_to_print("no GPU.", client)

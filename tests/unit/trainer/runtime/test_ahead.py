import threading

import pytest

from trainer.runtime.ahead import call_ahead


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_the_order_of_the_items(count, threads):
    futures = call_ahead(lambda item: item * item, range(count), ahead=3, threads=threads)
    assert [future.result() for future in futures] == [item**2 for item in range(count)]


def test_so_many_calls_are_begun_ahead_and_no_more():
    begun, go_on = [], threading.Semaphore(0)

    def call(item: int) -> int:
        begun.append(item)
        go_on.release()
        return item

    futures = call_ahead(call, range(10), ahead=4)
    assert next(futures).result() == 0
    for _ in range(4):
        assert go_on.acquire(timeout=10)
    assert begun == [0, 1, 2, 3]
    futures.close()
    assert begun == [0, 1, 2, 3]


def test_an_error_is_raised_in_its_turn():
    def call(item: int) -> float:
        return 1 / (item - 2)

    futures = call_ahead(call, range(5), ahead=5)
    assert [next(futures).result(), next(futures).result()] == [-0.5, -1]
    with pytest.raises(ZeroDivisionError):
        next(futures).result()

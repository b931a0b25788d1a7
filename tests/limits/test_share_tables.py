# this_file: tests/limits/test_share_tables.py
from __future__ import annotations

import os
import pickle
import sys
from types import ModuleType

import pytest

from opero import RateLimiter
from opero.limits.shared import share_all, unshared_objects

pytestmark = pytest.mark.internal

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_a_limit_is_known_by_the_attribute_that_holds_it_at_present(monkeypatch):
    module = ModuleType("shop_limits")
    monkeypatch.setitem(sys.modules, "shop_limits", module)
    module.limiter = RateLimiter("10/s")
    module.Api = type("Api", (), {"__module__": "shop_limits", "limiter": RateLimiter("5/s")})
    assert {"shop_limits:limiter", "shop_limits:Api.limiter"} <= share_all().keys()
    module.limiter = module.Api.limiter
    assert "shop_limits:limiter" not in share_all()


def test_a_holder_of_the_old_slot_takes_the_new_one():
    limiter = RateLimiter("3/hour")
    old = limiter.take_slot
    limiter.share()
    limiter.take_slot = old
    assert limiter.acquire() == 0
    assert limiter.current_state().wait_for() == 0
    limiter.acquire()
    limiter.acquire()
    assert limiter.current_state().wait_for() > 0


def test_where_nothing_can_be_shared_one_warning_says_so(monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: "/nowhere/at/all")
    limiter = RateLimiter("1/hour")
    with pytest.warns(RuntimeWarning, match=r"1 per hour.*per process.*No such file") as caught:
        assert not limiter.share()
    # Objects of other tests may be alive as well.
    assert repr(limiter) in unshared_objects()
    assert repr(limiter) not in unshared_objects()
    data = pickle.dumps(limiter)
    assert len(caught) == 1
    assert limiter.try_acquire()
    assert pickle.loads(data) is limiter
    assert not limiter.try_acquire()


@posix
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_does_not_report_what_its_parent_could_not_share(monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: "/nowhere/at/all")
    limiter = RateLimiter("1/hour")
    with pytest.warns(RuntimeWarning, match="per process"):
        limiter.share()
    child = os.fork()
    if not child:
        os._exit(len(unshared_objects()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert repr(limiter) in unshared_objects()

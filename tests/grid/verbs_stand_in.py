"""A fabric in memory with pyverbs' face, and a communicator of two ranks that are threads: the verbs transport runs on
it wherever there is no RDMA port. Writes arrive one at each look at a completion queue, in the order of the queue."""

from __future__ import annotations

import ctypes
import itertools
import pickle
import threading
from collections import deque
from types import SimpleNamespace

ENUMS = SimpleNamespace(
    IBV_ACCESS_LOCAL_WRITE=1, IBV_ACCESS_REMOTE_WRITE=2, IBV_QPT_RC=2, IBV_SEND_SIGNALED=2, IBV_PORT_ACTIVE=4,
    IBV_WR_RDMA_WRITE=0, IBV_WR_RDMA_WRITE_WITH_IMM=1,
)  # fmt: skip
RETRY_EXCEEDED, NOT_READY, REMOTE_ACCESS = 12, 13, 10


class RDMAError(Exception):
    def __init__(self, error_code):
        super().__init__(f"errno {error_code}")
        self.error_code = error_code


class Record:
    def __init__(self, *arguments, **fields):
        self.arguments = arguments
        self.__dict__.update(fields)

    def close(self):
        pass


class Piece:
    def __init__(self, address, length, key):
        self.address, self.length, self.key = address, length, key


class Work(Record):
    imm_data = None

    def set_wr_rdma(self, key, address):
        self.target = key, address


class Fabric:
    """Both ranks' ports. `dead`: nothing passes, and senders learn it. `refuses`: errno at connecting."""

    def __init__(self):
        self.pairs, self.regions, self.queues, self.keys = {}, {}, [], itertools.count(7)
        self.dead, self.refuses, self.lock = False, 0, threading.RLock()

    def modules(self):
        fabric = self

        class CQ:
            def __init__(self, context, entries):
                self.entries, self.ready = entries, deque()
                fabric.queues.append(self)

            def add(self, **fields):
                self.ready.append(SimpleNamespace(vendor_err=0, imm_data=0, **fields))
                assert len(self.ready) <= self.entries, "the completion queue runs over"

            def poll(self, most):
                with fabric.lock:
                    for pair in fabric.pairs.values():
                        pair.deliver()
                    found = [self.ready.popleft() for _ in range(min(most, len(self.ready)))]
                return len(found), found

            def close(self):
                fabric.queues.remove(self)

        class MR:
            def __init__(self, domain, nbytes, access, address):
                self.lkey = self.rkey = next(fabric.keys)
                fabric.regions[self.rkey] = address, nbytes

            def close(self):
                del fabric.regions[self.rkey]

        class QP:
            def __init__(self, domain, init, attributes):
                self.init, self.sends, self.receives, self.peer = init, deque(), deque(), None
                self.unreported = 0
                self.qp_num = next(fabric.keys)
                fabric.pairs[self.qp_num] = self

            def to_rts(self, attributes):
                if fabric.refuses:
                    raise RDMAError(fabric.refuses)
                assert attributes.retry_cnt < 7, "7 is for ever"
                assert attributes.rnr_retry < 7
                self.peer = attributes.dest_qp_num

            def post_recv(self, work):
                assert len(self.receives) < self.init.cap.max_recv_wr
                self.receives.append(work.wr_id)

            def post_send(self, work):
                with fabric.lock:
                    if len(self.sends) + self.unreported >= self.init.cap.max_send_wr:
                        raise RDMAError(12)
                    length = work.sg_list.length if work.num_sge else 0
                    reported = bool(work.send_flags & ENUMS.IBV_SEND_SIGNALED)
                    self.sends.append((work.wr_id, work.sg_list.address, length, work.target, work.imm_data, reported))

            def deliver(self):
                if not self.sends or self.peer not in fabric.pairs:
                    return
                wr_id, source, length, (key, address), announced, reported = self.sends.popleft()
                other, status = fabric.pairs[self.peer], 0
                start, nbytes = fabric.regions.get(key, (0, 0))
                if fabric.dead:
                    status = RETRY_EXCEEDED
                elif not start <= address <= address + length <= start + nbytes:
                    status = REMOTE_ACCESS
                elif announced is not None and not other.receives:
                    status = NOT_READY
                else:
                    ctypes.memmove(address, source, length)
                    if announced is not None:
                        other.init.rcq.add(wr_id=other.receives.popleft(), status=0)
                        other.init.rcq.ready[-1].imm_data = announced
                self.unreported += 1  # its place in the queue is free again with the next report
                if reported or status:
                    self.unreported = 0
                    self.init.scq.add(wr_id=wr_id, status=status)

            def close(self):
                del fabric.pairs[self.qp_num]

        context = SimpleNamespace(
            query_port=lambda number: SimpleNamespace(state=ENUMS.IBV_PORT_ACTIVE, active_mtu=3),
            query_device=lambda: SimpleNamespace(max_qp_wr=1000),
            close=lambda: None,
        )
        return SimpleNamespace(
            enums=ENUMS,
            pyverbs_error=SimpleNamespace(PyverbsError=RDMAError, PyverbsRDMAError=RDMAError),
            fork=SimpleNamespace(fork_init=lambda: None),
            device=SimpleNamespace(Context=lambda name: context),
            pd=SimpleNamespace(PD=Record),
            cq=SimpleNamespace(CQ=CQ),
            mr=SimpleNamespace(MR=MR),
            qp=SimpleNamespace(QP=QP, QPCap=Record, QPInitAttr=Record, QPAttr=Record),
            wr=SimpleNamespace(SGE=Piece, SendWR=Work, RecvWR=Record),
            addr=SimpleNamespace(GlobalRoute=Record, GID=Record, AHAttr=Record),
        )


class Comm:
    """One of two ranks; `other` is made from the first."""

    def __init__(self, other=None):
        self.rank, self.size = (0, 2) if other is None else (1, 2)
        self._mail = other._mail if other is not None else {}
        self._round = itertools.count()

    def _put(self, dest, tag, data):
        self._mail.setdefault((self.rank, dest, tag), deque()).append(data)
        return SimpleNamespace(test=lambda: (True, None), Test=lambda: True)

    def isend(self, item, dest, tag):
        return self._put(dest, tag, pickle.dumps(item))

    def Isend(self, array, dest, tag):
        return self._put(dest, tag, array.tobytes())

    def improbe(self, source, tag):
        box = self._mail.get((source, self.rank, tag))
        return SimpleNamespace(recv=lambda: pickle.loads(box.popleft())) if box else None

    def Irecv(self, array, source, tag):
        return SimpleNamespace(Test=lambda: bool(self._mail.get((source, self.rank, tag))))

    def Iallgather(self, mine, everybodys):
        number = next(self._round)
        self._mail[self.rank, "all", number] = mine.copy()

        def test():
            rows = [self._mail.get((rank, "all", number)) for rank in range(2)]
            if any(row is None for row in rows):
                return False
            everybodys[:] = rows
            return True

        return SimpleNamespace(Test=test)

"""The state machine of one stage of a pipeline: an event in, instructions out.

Frames are positional and idempotent (docs/protocol.md): `lease` fences old plans, `turn` old continuations, `seq`
duplicates, and `base_row` says where rows belong, so that nothing depends on when or how often a message arrives.

Knows: leases, sessions, and the order of rows. Does not know: time, sockets, threads, engines, or what rows contain.
"""

from __future__ import annotations

from dataclasses import replace

from edge_runtime.agent.draft_rules import in_frames, merge, rows_ahead
from edge_runtime.agent.open_rows import pruned, rescued
from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    TURN_ROWS,
    CancelRows,
    ControlLost,
    Event,
    Ignore,
    Instruction,
    Loaded,
    LoadFailed,
    Received,
    Rows,
    RowsOpened,
    RunRows,
    Send,
    SessionBroke,
    StageBroke,
    Work,
    WorkFinished,
)
from edge_runtime.agent.pipeline_rules import (
    ForStages,
    Tree,
    fences,
    frame_of,
    frame_problem,
    may_send,
    prompt_progress,
    tree_of,
)
from edge_runtime.agent.session import Session, finish_of
from edge_runtime.agent.session_state import SessionState
from edge_runtime.core import SessionId, Token
from edge_runtime.engine.side_rows import NO_SIDES, SideRows
from edge_runtime.protocol.messages import (
    CloseSession,
    Draft,
    Feed,
    Fence,
    FrameRows,
    Gap,
    LoadStage,
    OpenSession,
    Pooled,
    RowsHeld,
    Tokens,
    UnloadStage,
)

CHUNKS_UNDER_WAY = 2  # per stage: one that runs and one that waits; more would only fill memory


class PipelineState(SessionState):
    """At most one lease at a time. `handle` is the only way in. `version` moves with every event."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 0

    def handle(self, event: Event) -> list[Instruction]:
        self.version += 1
        match event:
            case Received():
                return self._received(event)
            case Loaded():
                return self._loaded(event)
            case LoadFailed():
                return self._load_failed(event)
            case RowsOpened():
                return self._rows_opened(event)
            case WorkFinished():
                return self._work_finished(event)
            case SessionBroke():
                session = self.sessions.get(event.session)
                if session is None or event.lease != self.lease:
                    return [Ignore("a failure of a session that is closed")]
                return self._fail(session, event.code, event.reason)
            case ControlLost():
                return self._control_lost()
            case StageBroke():
                return self._load_failed(LoadFailed(event.lease, event.code, event.reason, event.hint))

    # ------------------------------------------------------------ messages

    def _received(self, event: Received) -> list[Instruction]:
        message, source = event.message, event.source
        if source == COORDINATOR and isinstance(message, LoadStage):
            return self._load_stage(message)
        if source == COORDINATOR and isinstance(message, UnloadStage):
            return self._unload_stage(message)
        if not isinstance(message, ForStages):
            return [Ignore(f"{type(message).__name__} is not for a stage")]
        if message.lease != self.lease or self.loaded is None:
            return [Ignore(f"{type(message).__name__} of lease {message.lease}, not in force")]
        assert self.order is not None
        if not may_send(self.order, source, message):
            return [
                Ignore(f"{type(message).__name__} from {source or 'the coordinator'}, who may not send it")
            ]
        if isinstance(message, OpenSession):
            return self._open(message)
        session = self.sessions.get(SessionId(message.session))
        if isinstance(message, CloseSession):
            return self._close_kept(message)
        if session is None or session.halted:
            return [Ignore(f"{type(message).__name__} for session {message.session}, not running")]
        match message:
            case Feed():
                return self._feed(session, message)
            case FrameRows():
                return self._frame(session, message, event.rows)
            case RowsHeld():
                return self._rows_held(session, message.rows)
            case Draft():
                return self._draft(session, message)
            case Fence():
                return self._fence(session, message.turn)
            case Tokens():
                return self._ring(session, message)

    # ------------------------------------------------------------ stage 1: the single writer

    def _feed(self, session: Session, feed: Feed) -> list[Instruction]:
        wanted = session.rows + len(session.fed)
        if feed.base_row > wanted:
            return self._gap(session, wanted)
        if feed.base_row + len(feed.ids) > max(session.order.forced_rows, wanted):
            return self._fail(session, "protocol", "more ids were fed than the session was opened for")
        new = feed.ids[wanted - feed.base_row :]
        if not new:
            return [Ignore(f"rows of session {session.id} that were fed before")]
        if not self._are_ids(new):
            return self._fail(session, "protocol", "a fed id is outside the model's vocabulary")
        session.fed.extend(new)
        return self._go_on(session)

    def _issue_prompts(self) -> list[Instruction]:
        """Chunk after chunk, who came first first, no further ahead of the tail than keeps every stage busy."""
        if self.order is None:
            return []
        grid, stages = self.order.prefill_chunk_tokens, len(self.order.devices)
        under_way_rows = 0 if self.is_tail else sum(each.rows_under_way for each in self.sessions.values())
        instructions: list[Instruction] = []
        while self._prompts:
            key, turn_rows = next(iter(self._prompts.items()))
            session = self.sessions[key]
            chunk_rows = max(grid, len(session.fed)) if session.is_bidirectional else grid
            if under_way_rows >= CHUNKS_UNDER_WAY * stages * chunk_rows and not self.is_tail:
                break
            ids = session.take_chunk(grid)
            turn_rows += len(ids)
            if not ids or turn_rows >= TURN_ROWS:
                del self._prompts[key]
            if ids:  # else it comes back with its next ids, or with what the stages hold
                instructions.append(self._issue(session, ids))
                under_way_rows += len(ids)
                self._prompts[key] = turn_rows if turn_rows < TURN_ROWS else 0
        return instructions

    def _go_on(self, session: Session) -> list[Instruction]:
        if session.fed:
            self._prompts.setdefault(session.id, 0)
        return self._issue_prompts()

    def _rows_held(self, session: Session, rows: int) -> list[Instruction]:
        if not 0 <= rows <= session.order.forced_rows:
            return self._fail(session, "protocol", "the tail holds rows that were never given")
        if session.first_row is None:
            session.begin_at(min(rows, session.held_rows))
        else:
            session.through = max(session.through, min(rows, session.rows))
        return self._go_on(session)

    def _ring(self, session: Session, message: Tokens) -> list[Instruction]:
        """The tail's ids come back round: positions say what is new, whatever turn they were sampled in."""
        if session.rows < session.order.forced_rows:
            return [Ignore("tokens of a session whose given rows are not all issued")]
        session.through = session.order.forced_rows  # the first token comes after all of them
        chain, known = session.chain, session.chain.next_position
        new = chain.continued_by(message.tokens)
        if not new:
            return [Ignore(f"tokens {message.tokens}: position {known} is next")]
        if not self._are_ids(tuple(token.id for token in new)):
            return self._fail(session, "protocol", "the tail sent an id outside the model's vocabulary")
        for token in new:
            chain.commit(token.id)
            if token.finish or token.position + 1 >= session.order.max_rows:
                session.halted = True
                break
        return [*self._go_round(session, known), *self._issue_prompts()]

    def _go_round(self, session: Session, known: int) -> list[Instruction]:
        """Positions from `known` on are committed: those without a row, or with one of another id, get theirs."""
        dead = self._abandon_wrong(session, known)
        ids = () if session.halted else session.chain.sure(session.rows)
        held, session.held_drafts = session.held_drafts, []
        rows = [self._issue(session, ids)] if ids else []
        return [*dead, *rows, *(each for draft in held for each in self._draft(session, draft))]

    def _draft(self, session: Session, draft: Draft) -> list[Instruction]:
        assert self.loaded is not None
        is_sound = self.loaded.row_invariant and draft.ids and self._are_ids(draft.ids) and not session.halted
        if not is_sound or session.hold(draft):
            return [Ignore(f"a draft for {draft.base_row} that can't be verified, or not yet")]
        ahead = rows_ahead(sum(not each.halted for each in self.sessions.values()), self._stages)
        merged = merge(session.chain, session.rows, session.order.max_rows, session.any_turn, ahead, draft)
        session.draft_turn = merged.turn
        if not merged.ids:
            return [Ignore(f"a draft for {draft.base_row}: {merged.reason}")]
        return [self._issue(session, *frame) for frame in in_frames(session.rows, merged)]

    def _issue(self, session: Session, ids: tuple[int, ...], sides: SideRows = NO_SIDES) -> RunRows:
        session.seq += 1
        session.side_depth = max(session.side_depth, sides.depth)
        return RunRows(self._accept(session, session.rows, ids, None, sides))

    # ------------------------------------------------------------ every stage

    def _frame(self, session: Session, frame: FrameRows, rows: Rows | None) -> list[Instruction]:
        is_repeated = frame.seq == session.seq and frame.base_row < session.rows
        if frame.seq < session.seq or is_repeated or frame.turn < session.turn:
            return [Ignore(f"frame {frame.seq} of turn {frame.turn}: seen {session.seq} of {session.turn}")]
        tree = tree_of(frame)
        problem = frame_problem(session.order, frame, tree, rows)
        if problem is None and not self._are_ids(frame.ids):
            problem = "protocol", f"frame {frame.seq} has ids outside the model's vocabulary"
        if problem is not None:
            return self._fail(session, *problem)
        if frame.base_row > session.rows:
            return self._gap(session, session.rows)
        assert tree is not None
        wrong = session.chain.contradicts(frame.base_row, tree[0])
        if wrong is not None and wrong > session.turn:  # at the tail: it alone knows what is committed
            return self._contradicted(session, frame, tree, rows, wrong)
        dead = [CancelRows(self.lease, session.id, frame.turn)] if frame.turn > session.turn else []
        session.seq, session.turn = frame.seq, frame.turn
        return [*dead, RunRows(self._accept(session, frame.base_row, tree[0], rows, tree[1]))]

    def _contradicted(
        self, session: Session, frame: FrameRows, tree: Tree, rows: Rows | None, wrong: int
    ) -> list[Instruction]:
        """The chain is dead from position `wrong` on; side rows may go the committed way."""
        assert self.order is not None
        dead = self._abandon(session, wrong)
        where = self.lease, session.id, wrong, frame.seq, frame.base_row
        work = rescued(
            Work(*where, tree[0], rows, 0, False, False, tree[1]), wrong, session.chain.sure(wrong)
        )
        saved: list[Instruction] = []
        if work is not None:
            session.seq = frame.seq
            saved = [RunRows(self._accept(session, frame.base_row, work.ids, work.hidden, work.sides))]
        return [*dead, *saved, *fences(self.order, session)]

    def _fence(self, session: Session, turn: int) -> list[Instruction]:
        if not session.turn < turn <= session.order.max_rows:
            return [Ignore(f"turn {turn}: {session.turn} is in force")]
        return self._abandon(session, turn)

    def _abandon_wrong(self, session: Session, known: int) -> list[Instruction]:
        """Rows whose ids are not those committed, or that come after the end. Positions from `known` on are new."""
        end = session.chain.next_position
        row = min(session.chain.departs(known), end - 1 if session.halted else end)
        is_over = session.halted and session.guessed  # stages before may hold more
        return self._abandon(session, row) if is_over or row < min(end, session.rows) else []

    def _abandon(self, session: Session, row: int) -> list[Instruction]:
        session.abandon(row)
        # Side rows that wait at the tail may hold what is wanted. At stage 1 it is issued anew at once.
        is_inner_tail = self.is_tail and not self.is_first and not session.halted
        known = session.chain.sure(row) if is_inner_tail else ()
        return [CancelRows(self.lease, session.id, row, known)]

    def _accept(
        self, session: Session, base_row: int, ids: tuple[int, ...], hidden: Rows | None, sides: SideRows
    ) -> Work:
        session.rows = end = base_row + len(ids)
        is_sampled = self.is_tail and session.order.tail == "sampler"
        first = session.chain.next_position - 1  # at the tail: rows below have been sampled at
        logit_rows = max(0, end - max(base_row, first)) if is_sampled else 0
        session.guessed |= is_sampled and (bool(sides) or end > first + 1)
        if self.is_first or self.is_tail:
            session.chain.issue(base_row, ids)
        where = self.lease, session.id, session.turn, session.seq, base_row
        is_prompt = base_row < session.order.forced_rows
        work = Work(*where, ids, hidden, logit_rows, session.is_bidirectional, is_prompt, sides)
        return pruned(work, first) if is_sampled else work

    def _gap(self, session: Session, wanted_row: int) -> list[Instruction]:
        """Said once: the coordinator closes the session everywhere and feeds a new one."""
        session.halted = True
        return [Send(COORDINATOR, Gap(session.id, self.lease, wanted_row))]

    def _work_finished(self, event: WorkFinished) -> list[Instruction]:
        work = event.work
        session = self.sessions.get(work.session)
        if work.lease != self.lease or session is None or self.loaded is None:
            return [Ignore(f"rows of session {work.session}, which is closed")]
        if work.turn < session.turn:
            return [Ignore(f"rows of turn {work.turn}: {session.turn} is in force")]
        assert self.order is not None
        if not self.is_tail:
            return [Send(self.order.devices[self._stage + 1], frame_of(work), event.rows)]
        if session.order.tail == "pooler":
            pooled = Send(COORDINATOR, Pooled(session.id, self.lease), event.rows)
            return [pooled, *prompt_progress(self.order, work)]
        if not work.logit_rows and work.is_prompt:
            return prompt_progress(self.order, work)
        return self._commit(session, work, event.tokens)

    def _commit(self, session: Session, work: Work, sampled: tuple[Token, ...]) -> list[Instruction]:
        assert self.order is not None
        known = session.chain.next_position
        tokens: list[Token] = []
        for token in sampled:
            if token.position == session.chain.next_position:
                tokens.append(replace(token, finish=finish_of(session.order, token)))
                session.chain.commit(token.id)
            if tokens and tokens[-1].finish:
                session.halted = True
                break
        if not tokens:
            return []
        then = self._go_round(session, known) if self.is_first else self._abandon_wrong(session, known)
        message = Tokens(session.id, self.lease, session.turn, tuple(tokens))
        ring = [Send(to, message) for to in dict.fromkeys((self._ring_to, COORDINATOR))]
        return [*then, *ring, *(fences(self.order, session) if then else [])]

    def _are_ids(self, ids: tuple[int, ...]) -> bool:
        assert self.loaded is not None
        return min(ids) >= 0 and max(ids) < self.loaded.vocab_size

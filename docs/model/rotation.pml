/*
 * KEK rotation: two instances, two keys, two competing runs of the job, two rotations (KEK 1 -> 2 -> 3),
 * with a kill, a pause and a power cut possible between any two steps.
 *
 * README.md maps the steps to the scripts of the service, says what is left out and why that is
 * safe, and lists the switches (-D...) that break the protocol on purpose.
 *
 * Every d_step is one script in one slot, or one act on the KEK source, or local work. Between two of
 * them anything else may happen: so a process "sleeps" simply by not being chosen.
 */

#define KEYS	2
#define LAST	3	/* KEK version that is active after the last rotation */

#ifdef ONE_TAG
#define TAGS	1
#define TAG(k)	0
#else
#define TAGS	2
#define TAG(k)	(k)
#endif
#define CTL	TAGS	/* the control slot is a node of its own */
#define NODES	(TAGS + 1)

#define NOBODY	2

/* ---- Store: what scripts see, and what a power cut would leave ------------------------------------ */

/* Of a tag. */
byte floor[TAGS] = 1;	/* least KEK version that may be written */
bool fence[TAGS];	/* it is above the token of run 1 */
/* Of a key, in its tag. */
byte ver[KEYS];		/* KEK version of the blob, 0: no record */
byte dek[KEYS];		/* which DEK is in the blob; see NEW_DEK */
byte census[KEYS];	/* bit v is set: the census of v names this key */
byte backup[KEYS];	/* least version that a backup of this key is wrapped under, 0: no backup */
/* Of the control slot. */
byte current = 1;	/* active version; older ones are decrypt_only, or retired if below `retired` */
byte retired = 1;	/* every version below it is retired */
byte step;		/* of the rotation: that to current + 1 in STAGED, to current after that */
byte holder = NOBODY;	/* of the lock: run 0, run 1, or one that is no more */
byte beat[2];		/* newest KEK version that an instance's heartbeat names, 0: lapsed */

/* A dirty node has writes that are not yet synced; u_ is what the disk has. AOF is a log, so what a cut
   leaves is the state at some earlier sync. u_ is 0 while a node is clean, to save states. */
bool dirty[NODES];
byte u_floor[TAGS], u_ver[KEYS], u_dek[KEYS], u_census[KEYS], u_backup[KEYS];
bool u_fence[TAGS];
byte u_current, u_retired, u_step, u_holder;

#define SETTLED		7	/* the durable one, whoever made it */

/* Steps in ctl. */
#define IDLE	0	/* no rotation under way */
#define STAGED	1	/* distribute: current + 1 is registered; waiting for live instances */
#define FLOOR	2	/* activated; the floor is being written into the tags */
#define SNAPSHOT 3
#define REWRAP	4
#define VERIFY	5

/* ---- KEK source: versions oldest..newest are there ------------------------------------------------ */

byte oldest = 1, newest = 1;

/* ---- Instances: what each has in hand, a blob that is wrapped and a script that has not yet run ----- */

byte op[2];
byte op_key[2], op_new[2];	/* for which key, wrapped under which version */
byte op_ver[2], op_dek[2];	/* rewrap: the blob that was read */
#define NOTHING	0
#define CREATE	1
#define RE_WRAP	2

/* ---- Runs of the job ------------------------------------------------------------------------------ */

/* Fencing tokens grow without end, but they are only compared, and at most two runs are alive: run 0 is the
   newer one and has the higher token. A third may begin when one of them is gone. */
byte pc[2];
byte at[2];		/* tag (key, in READ and SWAP) that pc is about */
byte goal[2];		/* version that this run rotates to, or retires everything below */
bool waits[2];		/* its script has run, and it waits until that is durable */
byte got_ver[2], got_dek[2];	/* the blob that READ found */

/* A blob of a DEK that somebody has in hand. */
#define HOLDS(k, d) \
	((op_key[0] == k && op_dek[0] == d) || (op_key[1] == k && op_dek[1] == d) || \
	(at[0] == k && got_dek[0] == d) || (at[1] == k && got_dek[1] == d))
/* A fresh DEK: any number that nobody has seen. Four hands, of which one is making it: three can be taken. */
#define NEW_DEK(k)	(!HOLDS(k, 1) -> 1 : (!HOLDS(k, 2) -> 2 : (!HOLDS(k, 3) -> 3 : 4)))

#define OFF	0
#define LOCK	1	/* ctl: take the lock */
#define PICK	2	/* what is there to do? */
#define LOOK	3	/* source: is there a version `goal`? */
#define ADD	4	/* source: add it, by compare-and-set */
#define STAGE	5	/* ctl: IDLE -> STAGED */
#define ACTIVATE 6	/* ctl: STAGED -> FLOOR, current = goal, if all that are live have it loaded */
#define RAISE	7	/* each tag: floor = goal */
#define RAISED	8	/* ctl: FLOOR -> SNAPSHOT */
#define COPY	9	/* each tag: backup of each record */
#define COPIED	10	/* ctl: SNAPSHOT -> REWRAP */
#define READ	11	/* each key in the census of an older version: read its blob */
#define SWAP	12	/* and put the new one, by compare-and-set on the old */
#define SWAPPED	13	/* ctl: REWRAP -> VERIFY */
#define PROVE	14	/* each tag: nothing older is left */
#define COMPLETE 15	/* ctl: VERIFY -> IDLE */
#define PURGE	16	/* each tag: delete the backups of finished rotations */
#define SCAN	17	/* each tag: does a record or a backup need a version below goal? */
#define RETIRE	18	/* ctl: retired = goal */
#define REMOVE	19	/* source: remove all below goal */

#define IN_CTL(p) \
	((p) == LOCK || (p) == PICK || (p) == STAGE || (p) == ACTIVATE || (p) == RAISED || (p) == COPIED || \
	(p) == SWAPPED || (p) == COMPLETE || (p) == RETIRE)
#define IN_TAG(p)	((p) == RAISE || (p) == COPY || (p) == SWAP || (p) == PROVE || (p) == PURGE || (p) == SCAN)
#define TAG_OF(j)	(pc[j] == SWAP -> TAG(at[j]) : at[j])
#define NODE_OF(j)	(IN_TAG(pc[j]) -> TAG_OF(j) : CTL)

/* ---- Ghosts: memory of the properties, no part of the protocol ------------------------------------- */

byte acked[KEYS];	/* DEK that a client may have been told of: whatever was durable once */
byte top[TAGS] = 1;		/* highest floor that was ever durable */
byte tmp;		/* 0 between steps */
byte calm;		/* see recovery */

/* ---- The switches --------------------------------------------------------------------------------- */

#ifdef NO_FLOOR
#define BELOW_FLOOR(k, v)	false
#else
#define BELOW_FLOOR(k, v)	((v) < floor[TAG(k)])
#endif

#ifdef NO_CAS
#define SAME_BLOB(k, v, d)	true
#else
#define SAME_BLOB(k, v, d)	(ver[k] == v && dek[k] == d)
#endif

#ifdef NO_FENCE
#define FENCED(j, t)	false
#define LOST(j)		false
#else
#define FENCED(j, t)	(j == 1 && fence[t])
#define LOST(j)		(holder != j)
#endif

#ifdef ACTIVATE_BEFORE_LOADED
#define LOADED(i, v)	true
#else
#define LOADED(i, v)	(beat[i] == 0 || beat[i] >= v)
#endif

#ifdef RETIRE_TRUSTS_CENSUS
#define RETIRE_FROM	SCAN
#define NEEDS(k, t, v)	IS_OLDER(k, t, v)
#else
#define RETIRE_FROM	PURGE
#define NEEDS(k, t, v)	(TAG(k) == t && ((ver[k] != 0 && ver[k] < v) || (backup[k] != 0 && backup[k] < v)))
#endif

/* What a run finds to do. */
#define CAN_REMOVE	(step == IDLE && oldest < retired)
#define CAN_RETIRE	(step == IDLE && oldest == retired && retired < current)
#define CAN_ROTATE	(step == IDLE && current < LAST)
#define ALL_DONE	(step == IDLE && oldest == LAST && retired == LAST && current == LAST)

/* Probes: a search must find these, or the properties might hold of a model that does nothing. */
#define STALE_KEK	1	/* a wrap was refused for the floor */
#define FENCED_OFF	2	/* a script of an older run was refused by a tag */
#define LOST_LOCK	3	/* ... and by ctl */
#define OTHER_BLOB	4	/* a compare-and-set failed */
#define BOTH_DONE	5	/* both rotations done, both old KEKs retired, both keys there */
#ifdef PROBE
#define SEEN(p)		assert(p != PROBE)
#else
#define SEEN(p)		skip
#endif

/* ---- The properties, checked after every change ---------------------------------------------------- */

#define KEY_SAFE(k) \
	assert(acked[k] == 0 || dek[k] == acked[k]);	/* no acknowledged key is lost or replaced */ \
	assert(ver[k] == 0 || (ver[k] >= oldest && ver[k] <= newest));	/* its KEK exists: it decrypts */ \
	assert(ver[k] == 0 || ver[k] >= retired);	/* never retired early: for records ... */ \
	assert(backup[k] == 0 || backup[k] >= retired);	/* ... and for backups */ \
	assert(census[k] == (ver[k] == 0 -> 0 : 1 << ver[k]));	/* census and records agree */ \
	assert(step != IDLE || ver[k] == 0 || ver[k] >= current)	/* a finished rotation left nothing behind */

#define OLDER(k, v)	(census[k] & ((1 << (v)) - 1))
#define IS_OLDER(k, t, v)	(TAG(k) == t && OLDER(k, v))

inline check()
{
	KEY_SAFE(0);
	KEY_SAFE(1);
	/* Whoever counts as live can unwrap and wrap under the active version. */
	assert(beat[0] == 0 || beat[0] >= current);
	assert(beat[1] == 0 || beat[1] >= current);
	if :: ALL_DONE && acked[0] && acked[1] -> SEEN(BOTH_DONE) :: else -> skip fi
}

/* ---- What can never matter again is forgotten, so that fewer states differ -------------------------- */

inline drop(i)
{
	op[i] = NOTHING; op_key[i] = 0; op_new[i] = 0; op_ver[i] = 0; op_dek[i] = 0
}

inline stop(j)
{
	pc[j] = OFF; at[j] = 0; goal[j] = 0; waits[j] = false; got_ver[j] = 0; got_dek[j] = 0;
	if :: holder == j -> holder = NOBODY :: else -> skip fi;
	if :: dirty[CTL] && u_holder == j -> u_holder = NOBODY :: else -> skip fi;
	if
	:: j == 1 ->
		fence[0] = false; u_fence[0] = false;
#ifndef ONE_TAG
		fence[1] = false; u_fence[1] = false
#endif
	:: else -> skip
	fi
}

/* What a cut would leave. */
#define DISK(n, u, x)	(dirty[n] -> u : x)
#define DISK_VER(k)	DISK(TAG(k), u_ver[k], ver[k])
#define DISK_BLOB_IS(k, v, d)	(DISK_VER(k) == v && DISK(TAG(k), u_dek[k], dek[k]) == d)

/* A script that would be refused now, and after a cut as well, will be refused for ever: floors and versions
   only rise, and a durable record stays. */
#define STALE(k, v)	(BELOW_FLOOR(k, v) && v < DISK(TAG(k), u_floor[TAG(k)], floor[TAG(k)]))
#define HOPELESS_OP(i) \
	(op[i] != NOTHING && (STALE(op_key[i], op_new[i]) || (DISK_VER(op_key[i]) != 0 && (op[i] == CREATE || \
	(!SAME_BLOB(op_key[i], op_ver[i], op_dek[i]) && !DISK_BLOB_IS(op_key[i], op_ver[i], op_dek[i]))))))

/* So will a run be that has durably lost the lock, in ctl, and in each tag that another run has claimed. */
#define GONE(j)		(LOST(j) && DISK(CTL, u_holder, holder) != j)
#define HOPELESS_RUN(j) \
	(pc[j] > LOCK && !waits[j] && ((IN_CTL(pc[j]) && GONE(j)) || \
	(IN_TAG(pc[j]) && FENCED(j, TAG_OF(j)) && DISK(TAG_OF(j), u_fence[TAG_OF(j)], true))))

#ifdef ADD_OVERWRITES
#define ADD_NO_USE(j)	false
#else
#define ADD_NO_USE(j)	((pc[j] == LOOK || pc[j] == ADD) && newest >= goal[j])
#endif

/* And a run that has durably lost the lock makes no difference if it would change nothing on its way. */
#define REACHED(j, k)	(pc[j] == SWAP || pc[j] == READ || TAG(k) >= at[j])
#define NO_USE(j, k) \
	((pc[j] == SCAN) || \
	(pc[j] == REMOVE && oldest >= goal[j]) || \
	ADD_NO_USE(j) || \
	(IN_TAG(pc[j]) && !REACHED(j, k)) || \
	(pc[j] == RAISE && floor[TAG(k)] >= goal[j] && DISK(TAG(k), u_floor[TAG(k)], LAST) >= goal[j]) || \
	(pc[j] == COPY && !dirty[TAG(k)] && backup[k] != 0) || \
	((pc[j] == READ || pc[j] == SWAP || pc[j] == PROVE) && !OLDER(k, goal[j]) && \
		(DISK_VER(k) == 0 || DISK_VER(k) >= goal[j])) || \
	(pc[j] == PURGE && backup[k] == 0 && DISK(TAG(k), u_backup[k], 0) == 0))
#define IDLE_RUN(j)	(pc[j] != OFF && !waits[j] && GONE(j) && NO_USE(j, 0) && NO_USE(j, 1))

/* Who made a DEK matters only until it is durable: then it is that key's DEK, and any other is not. */
inline settle(k)
{
	if
	:: dek[k] != 0 && dek[k] != SETTLED ->
		if :: op_key[0] == k && op_dek[0] == dek[k] -> op_dek[0] = SETTLED :: else -> skip fi;
		if :: op_key[1] == k && op_dek[1] == dek[k] -> op_dek[1] = SETTLED :: else -> skip fi;
		if :: at[0] == k && got_dek[0] == dek[k] -> got_dek[0] = SETTLED :: else -> skip fi;
		if :: at[1] == k && got_dek[1] == dek[k] -> got_dek[1] = SETTLED :: else -> skip fi;
		assert(acked[k] == 0 || acked[k] == dek[k]);
		dek[k] = SETTLED;
		acked[k] = SETTLED
	:: else -> skip
	fi
}

/* ---- Durability ----------------------------------------------------------------------------------- */

#define U_KEY(k) \
	u_ver[k] = ver[k]; u_dek[k] = dek[k]; u_census[k] = census[k]; u_backup[k] = backup[k]
#define U_KEY_BACK(k) \
	ver[k] = u_ver[k]; dek[k] = u_dek[k]; census[k] = u_census[k]; backup[k] = u_backup[k]
#define U_KEY_ZERO(k) \
	u_ver[k] = 0; u_dek[k] = 0; u_census[k] = 0; u_backup[k] = 0

/* Before a write into a node. */
inline touch_ctl()
{
	if
	:: dirty[CTL] -> skip
	:: else ->
		dirty[CTL] = true;
		u_current = current; u_retired = retired; u_holder = holder; u_step = step
	fi
}

inline touch(n)
{
	if
	:: dirty[n] -> skip
	:: else ->
		dirty[n] = true;
		u_floor[n] = floor[n]; u_fence[n] = fence[n];
		if :: TAG(0) == n -> U_KEY(0) :: else -> skip fi;
		if :: TAG(1) == n -> U_KEY(1) :: else -> skip fi
	fi
}

inline forget(n)
{
	dirty[n] = false;
	if
	:: n == CTL -> u_current = 0; u_retired = 0; u_holder = 0; u_step = 0
	:: else ->
		u_floor[n] = 0; u_fence[n] = false;
		if :: TAG(0) == n -> U_KEY_ZERO(0) :: else -> skip fi;
		if :: TAG(1) == n -> U_KEY_ZERO(1) :: else -> skip fi
	fi
}

#define NEXT_AT(j, n, p)	if :: at[j] + 1 < n -> at[j] = at[j] + 1 :: else -> at[j] = 0; pc[j] = p fi

/* A run that takes the lock goes on where the step stands. */
inline resume(j)
{
	goal[j] = (step == STAGED -> current + 1 : current);
	if
	:: step == STAGED -> pc[j] = ACTIVATE
	:: step == FLOOR -> pc[j] = RAISE
	:: step == SNAPSHOT -> pc[j] = COPY
	:: step == REWRAP -> pc[j] = READ
	:: step == VERIFY -> pc[j] = PROVE
	fi
}

/* The script at pc is durable: what follows. */
inline advance(j)
{
	if
	:: pc[j] == LOCK && step == IDLE -> pc[j] = PICK
	:: pc[j] == LOCK && step != IDLE -> resume(j)
	:: pc[j] == STAGE -> pc[j] = ACTIVATE
	:: pc[j] == ACTIVATE -> pc[j] = RAISE
	:: pc[j] == RAISE -> NEXT_AT(j, TAGS, RAISED)
	:: pc[j] == RAISED -> pc[j] = COPY
	:: pc[j] == COPY -> NEXT_AT(j, TAGS, COPIED)
	:: pc[j] == COPIED -> pc[j] = READ
	:: pc[j] == SWAP -> got_ver[j] = 0; got_dek[j] = 0; pc[j] = READ; NEXT_AT(j, KEYS, SWAPPED)
	:: pc[j] == SWAPPED -> pc[j] = PROVE
	:: pc[j] == PROVE -> NEXT_AT(j, TAGS, COMPLETE)
	:: pc[j] == COMPLETE -> goal[j] = 0; pc[j] = PICK
	:: pc[j] == PURGE -> NEXT_AT(j, TAGS, SCAN)
	:: pc[j] == RETIRE -> pc[j] = REMOVE
	fi
}

inline answer(j, n)
{
	if :: waits[j] && NODE_OF(j) == n -> waits[j] = false; advance(j) :: else -> skip fi
}

/* Whoever waits gets an error, and runs its script again. */
inline fail(j, n)
{
	if
	:: waits[j] && NODE_OF(j) == n ->
		waits[j] = false;
		if :: pc[j] == LOCK -> stop(j) :: else -> skip fi
	:: else -> skip
	fi
}

/* The fsync, and with it the answers to all who wait for it. Every record that is durable is taken as
   acknowledged: that asks the most of the protocol, and needs no list of who waits. */
inline sync_tag(n)
{
#ifndef HARM_ONLY
	assert(floor[n] >= top[n]);	/* the floor never falls */
#endif
	top[n] = floor[n];
	if :: TAG(0) == n -> settle(0) :: else -> skip fi;
	if :: TAG(1) == n -> settle(1) :: else -> skip fi;
	forget(n);
	answer(0, n);
	answer(1, n)
}

inline sync_ctl()
{
	forget(CTL);
	answer(0, CTL);
	answer(1, CTL)
}

inline cut_tag(n)
{
	floor[n] = u_floor[n]; fence[n] = u_fence[n];
	if :: TAG(0) == n -> U_KEY_BACK(0) :: else -> skip fi;
	if :: TAG(1) == n -> U_KEY_BACK(1) :: else -> skip fi;
	forget(n);
	fail(0, n);
	fail(1, n)
}

inline cut_ctl()
{
	current = u_current; retired = u_retired; holder = u_holder; step = u_step;
	forget(CTL);
	fail(0, CTL);
	fail(1, CTL)
}

#define SAME(k)	(ver[k] == u_ver[k] && dek[k] == u_dek[k] && census[k] == u_census[k] && backup[k] == u_backup[k])
#define AWAITED(n)	((waits[0] && NODE_OF(0) == n) || (waits[1] && NODE_OF(1) == n))

inline tidy_tag(n)
{
	if
	:: dirty[n] && !AWAITED(n) && floor[n] == u_floor[n] && fence[n] == u_fence[n] &&
	   (TAG(0) != n || SAME(0)) && (TAG(1) != n || SAME(1)) -> forget(n)
	:: else -> skip
	fi
}

#define CODE(i)	((((op[i] * 2 + op_key[i]) * 4 + op_new[i]) * 4 + op_ver[i]) * 8 + op_dek[i])
#define SWITCH(a)	tmp = a[0]; a[0] = a[1]; a[1] = tmp

/* Instances are alike: which of them has which blob in hand, or heartbeat, makes no difference. */
inline sort()
{
#ifndef NO_TIDY
	if
	:: CODE(0) < CODE(1) ->
		SWITCH(op); SWITCH(op_key); SWITCH(op_new); SWITCH(op_ver); SWITCH(op_dek)
	:: else -> skip
	fi;
	if :: beat[0] < beat[1] -> SWITCH(beat) :: else -> skip fi;
	tmp = 0;
#endif
	skip
}

inline tidy()
{
#ifndef NO_TIDY
	if :: HOPELESS_OP(0) -> drop(0) :: else -> skip fi;
	if :: HOPELESS_OP(1) -> drop(1) :: else -> skip fi;
	if :: HOPELESS_RUN(0) -> stop(0) :: else -> skip fi;
	if :: HOPELESS_RUN(1) || IDLE_RUN(1) -> stop(1) :: else -> skip fi;
	tidy_tag(0);
#ifndef ONE_TAG
	tidy_tag(1);
#endif
	sort();
#endif
#ifdef NO_CUTS
	if :: dirty[CTL] -> sync_ctl() :: else -> skip fi;
	if :: dirty[0] -> sync_tag(0) :: else -> skip fi;
#ifndef ONE_TAG
	if :: dirty[1] -> sync_tag(1) :: else -> skip fi;
#endif
#endif
	skip
}

/* ---- Scripts that write records -------------------------------------------------------------------- */

inline put(k, v, d)
{
#ifndef HARM_ONLY
	assert(v >= top[TAG(k)]);	/* nothing is written below a floor that was once durable */
#endif
	ver[k] = v;
	dek[k] = d
}

/* create.lua. That the record is there is an answer too ('found'); it changes nothing. */
inline create_script(i)
{
	if
	:: ver[op_key[i]] == 0 && !BELOW_FLOOR(op_key[i], op_new[i]) ->
		touch(TAG(op_key[i]));
		put(op_key[i], op_new[i], NEW_DEK(op_key[i]));
		census[op_key[i]] = census[op_key[i]] | (1 << op_new[i]);
#ifdef ACK_BEFORE_DURABLE
		acked[op_key[i]] = dek[op_key[i]];
#endif
	:: else ->
		if :: ver[op_key[i]] == 0 -> SEEN(STALE_KEK) :: else -> skip fi
	fi
}

/* rewrap.lua: moves the key in the census from the version that was read to the new one. */
inline rewrap_write(k, old, new, d)
{
	touch(TAG(k));
	put(k, new, d);
	census[k] = (census[k] & ~(1 << old)) | (1 << new)
}

#define MAY_REWRAP(k, v, d, new)	(ver[k] != 0 && SAME_BLOB(k, v, d) && !BELOW_FLOOR(k, new))

inline rewrap_script(i)
{
	if
	:: MAY_REWRAP(op_key[i], op_ver[i], op_dek[i], op_new[i]) ->
		rewrap_write(op_key[i], op_ver[i], op_new[i], op_dek[i])
	:: else ->
		if :: !SAME_BLOB(op_key[i], op_ver[i], op_dek[i]) -> SEEN(OTHER_BLOB) :: else -> skip fi
	fi
}

/* ---- Scripts and steps of a run -------------------------------------------------------------------- */

/* Whoever comes gets the lock: a lock may lapse at any moment, for its holder may sleep at any. */
#ifdef ONE_RUN
#define CAN_START	(pc[0] == OFF)
#else
#define CAN_START	(pc[0] == OFF || pc[1] == OFF)
#endif

inline start()
{
	touch_ctl();
	if
	:: pc[0] != OFF ->	/* from now on it is the older one */
		pc[1] = pc[0]; at[1] = at[0]; goal[1] = goal[0]; waits[1] = waits[0];
		got_ver[1] = got_ver[0]; got_dek[1] = got_dek[0];
		if :: u_holder == 0 -> u_holder = 1 :: else -> skip fi;
		at[0] = 0; goal[0] = 0; got_ver[0] = 0; got_dek[0] = 0
	:: else -> skip
	fi;
	holder = 0;
	pc[0] = LOCK;
	waits[0] = true
}

/* Every write of a run into a tag begins so. */
inline claim(j, t)
{
	touch(t);
#ifndef HARM_ONLY
	assert(j == 0 || !fence[t]);	/* a run that another one has shut out writes nothing */
#endif
	fence[t] = (j == 0 && pc[1] != OFF);
	waits[j] = true
}

/* A script that moves the step; run again, it finds it moved. */
inline move(j, from, to)
{
	if
	:: LOST(j) || (step != from && step != to) -> SEEN(LOST_LOCK); stop(j)
	:: else -> touch_ctl(); step = to; waits[j] = true
	fi
}

#define BACK_UP(k)	if :: backup[k] == 0 -> backup[k] = ver[k] :: else -> skip fi

#define CAN_STEP(j) \
	(pc[j] > PICK && !waits[j] && \
	(pc[j] != ACTIVATE || LOST(j) || current == goal[j] || (LOADED(0, goal[j]) && LOADED(1, goal[j]))))

inline job_step(j)
{
	if
	:: pc[j] == LOOK ->
#ifdef NO_ADOPT
		if :: newest >= goal[j] -> stop(j) :: else -> pc[j] = ADD fi
#else
		if :: newest >= goal[j] -> pc[j] = STAGE :: else -> pc[j] = ADD fi
#endif
	:: pc[j] == ADD ->
#ifdef ADD_OVERWRITES
		/* A registered KEK is never replaced. */
		assert(goal[j] > current && (goal[j] != current + 1 || step != STAGED));
#endif
		if :: newest < goal[j] -> newest = goal[j] :: else -> skip fi;
		pc[j] = STAGE
	:: pc[j] == STAGE -> move(j, IDLE, STAGED)
	:: pc[j] == ACTIVATE ->
		if
		:: LOST(j) || (current != goal[j] && step != STAGED) -> stop(j)
		:: else ->
			touch_ctl(); current = goal[j]; step = FLOOR; waits[j] = true;
			check();
			beat[0] = 0; beat[1] = 0	/* heartbeats do not matter again until the next distribute */
		fi
	:: pc[j] == RAISE ->
		if
		:: FENCED(j, at[j]) -> SEEN(FENCED_OFF); stop(j)
		:: else -> claim(j, at[j]); floor[at[j]] = goal[j]
		fi
	:: pc[j] == RAISED -> move(j, FLOOR, SNAPSHOT)
	:: pc[j] == COPY ->
		if
		:: FENCED(j, at[j]) -> SEEN(FENCED_OFF); stop(j)
		:: else ->
			claim(j, at[j]);
			if :: TAG(0) == at[j] -> BACK_UP(0) :: else -> skip fi;
			if :: TAG(1) == at[j] -> BACK_UP(1) :: else -> skip fi
		fi
	:: pc[j] == COPIED -> move(j, SNAPSHOT, REWRAP)
	:: pc[j] == READ ->
		if
		:: OLDER(at[j], goal[j]) -> got_ver[j] = ver[at[j]]; got_dek[j] = dek[at[j]]; pc[j] = SWAP
		:: else -> NEXT_AT(j, KEYS, SWAPPED)
		fi
	:: pc[j] == SWAP ->
		if
		:: FENCED(j, TAG(at[j])) -> stop(j)
		:: else ->
			if
			:: MAY_REWRAP(at[j], got_ver[j], got_dek[j], goal[j]) ->
				claim(j, TAG(at[j]));
				BACK_UP(at[j]);
				rewrap_write(at[j], got_ver[j], goal[j], got_dek[j])
			:: else -> got_ver[j] = 0; got_dek[j] = 0; pc[j] = READ
			fi
		fi
	:: pc[j] == SWAPPED -> move(j, REWRAP, VERIFY)
	:: pc[j] == PROVE ->
		if
		:: FENCED(j, at[j]) -> SEEN(FENCED_OFF); stop(j)
		:: IS_OLDER(0, at[j], goal[j]) || IS_OLDER(1, at[j], goal[j]) -> at[j] = 0; pc[j] = READ
		:: else ->
			/* It writes, so that its answer speaks of what is durable. */
			claim(j, at[j]);
#ifdef VERIFY_WITHOUT_SYNC
			waits[j] = false; advance(j)
#endif
		fi
	:: pc[j] == COMPLETE -> move(j, VERIFY, IDLE)
	:: pc[j] == PURGE ->
		if
		:: FENCED(j, at[j]) -> SEEN(FENCED_OFF); stop(j)
		:: else ->
			claim(j, at[j]);
			if :: TAG(0) == at[j] -> backup[0] = 0 :: else -> skip fi;
			if :: TAG(1) == at[j] -> backup[1] = 0 :: else -> skip fi
		fi
	:: pc[j] == SCAN ->
		if
		:: FENCED(j, at[j]) || NEEDS(0, at[j], goal[j]) || NEEDS(1, at[j], goal[j]) -> stop(j)
		:: else -> NEXT_AT(j, TAGS, RETIRE)
		fi
	:: pc[j] == RETIRE ->
		if
		:: LOST(j) || step != IDLE -> stop(j)
		:: else -> touch_ctl(); retired = goal[j]; waits[j] = true
		fi
	:: pc[j] == REMOVE ->
		if :: oldest < goal[j] -> oldest = goal[j] :: else -> skip fi;
		goal[j] = 0; pc[j] = PICK
	fi
}


/* ---- Processes ------------------------------------------------------------------------------------ */

/* An instance may still believe in any version that was ever active. Killed with a blob in hand, it leaves the
   world as if it had never begun: so there is no step for that. A create of a durable record, or a wrap
   below a durable floor, is hopeless before it begins. */
#define CREATES(k, v) \
	:: d_step { op[i] == NOTHING && v <= current && DISK_VER(k) == 0 && !STALE(k, v) -> \
		op[i] = CREATE; op_key[i] = k; op_new[i] = v; sort() }
#define REWRAPS(k, v) \
	:: d_step { op[i] == NOTHING && v <= current && ver[k] != 0 && ver[k] < v && !STALE(k, v) -> \
		op[i] = RE_WRAP; op_key[i] = k; op_new[i] = v; op_ver[i] = ver[k]; op_dek[i] = dek[k]; sort() }

#define i	_pid

active [2] proctype instance() provided (calm == 0)
{
	do
	CREATES(0, 1)
	CREATES(0, 2)
	CREATES(0, 3)
	CREATES(1, 1)
	CREATES(1, 2)
	CREATES(1, 3)
	REWRAPS(0, 2)
	REWRAPS(0, 3)
	REWRAPS(1, 2)
	REWRAPS(1, 3)
	:: d_step { op[i] == CREATE -> create_script(i); drop(i); check(); tidy() }
	:: d_step { op[i] == RE_WRAP -> rewrap_script(i); drop(i); check(); tidy() }
	/* Loads what is in the source and says so. */
	:: d_step { newest > current && beat[i] != newest -> beat[i] = newest; sort() }
	/* Wakes, having loaded before the newest was there: counts as live only if it has the active one. */
	:: d_step { newest > current && beat[i] == 0 -> beat[i] = current; sort() }
	:: d_step { newest > current && beat[i] != 0 -> beat[i] = 0; sort() }	/* lapses */
	od
}

#undef i
#define j	(_pid - 2)

active [2] proctype job() provided (calm == 0)
{
	do
	:: d_step { pc[j] == PICK && LOST(j) -> stop(j); tidy() }
	:: d_step { pc[j] == PICK && CAN_REMOVE -> goal[j] = retired; pc[j] = REMOVE }
	:: d_step { pc[j] == PICK && CAN_RETIRE -> goal[j] = current; pc[j] = RETIRE_FROM }
	:: d_step { pc[j] == PICK && CAN_ROTATE -> goal[j] = current + 1; pc[j] = LOOK }
	:: d_step { pc[j] == PICK && ALL_DONE -> stop(j); tidy() }
	:: d_step { CAN_STEP(j) -> job_step(j); check(); tidy() }
	:: d_step { waits[j] && pc[j] != LOCK -> waits[j] = false; tidy() }	/* no answer: it runs its script again */
	:: d_step { pc[j] != OFF -> stop(j); tidy() }		/* killed */
	od
}

#undef j

active proctype others() provided (calm == 0)
{
	do
	:: d_step { CAN_START && !ALL_DONE -> start(); tidy() }
	:: d_step { dirty[CTL] -> sync_ctl(); check(); tidy() }
	:: d_step { dirty[CTL] -> cut_ctl(); check(); tidy() }
	:: d_step { dirty[0] -> sync_tag(0); check(); tidy() }
	:: d_step { dirty[0] -> cut_tag(0); check(); tidy() }
#ifndef ONE_TAG
	:: d_step { dirty[1] -> sync_tag(1); check(); tidy() }
	:: d_step { dirty[1] -> cut_tag(1); check(); tidy() }
#endif
	od
}

/* From every reachable state the rotations can finish: faults end, instances load what is in the source, and
   the run that is there goes on, or all are killed and a new one begins. It must reach the end, in few steps. */

#define STEPS	100

inline lull()
{
	calm = 1;
	drop(0); drop(1);
	beat[0] = 0; beat[1] = 0;
	stop(1);
	if :: dirty[CTL] -> sync_ctl() :: else -> skip fi;
	if :: dirty[0] -> sync_tag(0) :: else -> skip fi;
#ifndef ONE_TAG
	if :: dirty[1] -> sync_tag(1) :: else -> skip fi;
#endif
	check()
}

inline run_alone()
{
	assert(pc[0] != OFF);	/* it does not give up */
	if
	:: waits[0] ->
		if
		:: NODE_OF(0) == CTL -> sync_ctl()
		:: NODE_OF(0) == 0 -> sync_tag(0)
#ifndef ONE_TAG
		:: NODE_OF(0) == 1 -> sync_tag(1)
#endif
		fi
	:: else ->
		if
		:: pc[0] == PICK ->
			if
			:: CAN_REMOVE -> goal[0] = retired; pc[0] = REMOVE
			:: CAN_RETIRE -> goal[0] = current; pc[0] = RETIRE_FROM
			:: CAN_ROTATE -> goal[0] = current + 1; pc[0] = LOOK
			fi
		:: else -> assert(CAN_STEP(0)); job_step(0)
		fi
	fi
}

#define FLOOR_FITS(t)	assert(floor[t] == current)	/* so creates are accepted */

#ifndef SAFETY_ONLY
active proctype recovery()
{
	do
	:: d_step { calm == 0 -> lull() }
	:: d_step { calm == 0 && pc[0] != OFF -> stop(0); lull() }
	:: d_step { calm == 1 ->
		calm = 2;
		if :: pc[0] == OFF && !ALL_DONE -> start() :: else -> skip fi;
		tmp = STEPS;
		do
		:: ALL_DONE && !waits[0] && pc[0] <= PICK -> break
		:: else -> assert(tmp > 0); tmp = tmp - 1; run_alone(); check()
		od;
		FLOOR_FITS(0);
#ifndef ONE_TAG
		FLOOR_FITS(1);
#endif
		stop(0); tmp = 0
	}
	od
}
#endif

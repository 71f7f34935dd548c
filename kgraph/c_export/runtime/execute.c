/* Running a plan. All threads walk over the same steps. A step is cut into chunks; every thread owns some, runs them, and
   before it would wait for others takes chunks that their owners have not begun: a thread that comes late or loses its
   core delays a call by one chunk at most. Which thread runs a chunk makes no difference to the result. */
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

typedef struct {
    _Alignas(KG_LINE) atomic_llong count;
} kg_counter;

struct kg_job {
    const kg_plan *plan;
    kg_pool *pool;
    void **operands;
    kg_counter *claims, *done;
    unsigned char *scratch;
    int threads;
};

static size_t kg_workspace_bytes(const kg_plan *plan)
{
    size_t bytes = plan->arena_bytes + plan->copies_bytes + plan->scratch_bytes * (size_t)plan->threads;
    bytes += ((size_t)plan->num_claims + (size_t)plan->num_groups) * sizeof(kg_counter);
    return bytes + (size_t)plan->program->num_operands * sizeof(void *) + 2 * KG_ALIGNMENT;
}

static void kg_launch(const kg_job *job, const kg_record *r, int64_t begin, int64_t end, void *scratch)
{
    r->kernel(job->operands + r->operands, r->sizes, begin, end, scratch);
}

/* Run the chunks of a step that `owner` owns and nobody has begun; gives how many. */
static int64_t kg_drain(kg_job *job, const kg_record *r, int owner, void *scratch)
{
    atomic_llong *claims = &job->claims[r->claims + owner].count;
    int64_t chunks = r->chunks * r->threads, grains = r->extent / r->grain, run = 0;
    while (atomic_load_explicit(claims, memory_order_relaxed) < r->chunks) {
        int64_t own = atomic_fetch_add_explicit(claims, 1, memory_order_relaxed), number = owner * r->chunks + own;
        if (own >= r->chunks)
            break;
        kg_launch(job, r, grains * number / chunks * r->grain,
                  number + 1 == chunks ? r->extent : grains * (number + 1) / chunks * r->grain, scratch);
        run++;
    }
    return run;
}

/* The group of the steps from `from` to `to` ends: tell what this thread has run of it, help, and wait for the rest. */
static void kg_meet(kg_job *job, const kg_record *from, const kg_record *to, int64_t run, int thread, void *scratch,
                    int leaves)
{
    atomic_llong *done = &job->done[to->group].count;
    const kg_record *r;
    int64_t now, helped = 0;
    int hop, i;
    if (run && atomic_fetch_add(done, run) + run == to->group_chunks)
        kg_wake(job->pool);
    if (atomic_load_explicit(done, memory_order_acquire) == to->group_chunks)
        return;
    for (r = from; r < to; r++)
        for (hop = 1; r->threads > 1 && hop < r->threads + (thread >= r->threads); hop++)
            helped += kg_drain(job, r, (thread + hop) % r->threads, scratch);
    if (helped && atomic_fetch_add(done, helped) + helped == to->group_chunks)
        kg_wake(job->pool);
    if (leaves)
        return;
    for (i = 0; i < KG_SPINS_IN_CALL; i++) {
        if (atomic_load_explicit(done, memory_order_acquire) == to->group_chunks)
            return;
        kg_pause();
    }
    pthread_mutex_lock(&job->pool->mutex);
    atomic_fetch_add(&job->pool->sleepers, 1);
    for (now = atomic_load(done); now != to->group_chunks; now = atomic_load(done))
        pthread_cond_wait(&job->pool->changed, &job->pool->mutex);
    atomic_fetch_sub(&job->pool->sleepers, 1);
    pthread_mutex_unlock(&job->pool->mutex);
}

/* Kernels run in the default state of the floating-point unit, whatever the caller's thread has set. */
static unsigned kg_enter_float_state(void)
{
#if defined(__x86_64__)
    unsigned state = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return state;
#else
    return 0;
#endif
}

static void kg_leave_float_state(unsigned state)
{
#if defined(__x86_64__)
    _mm_setcsr(state);
#else
    (void)state;
#endif
}

static void kg_walk(kg_job *job, int thread)
{
    const kg_plan *plan = job->plan;
    const kg_record *r = plan->records, *end = r + plan->num_records, *from = r;
    void *scratch = job->scratch + plan->scratch_bytes * (size_t)thread;
    int64_t run = 0;
    for (; r < end; r++) {
        if (r->barrier) {
            kg_meet(job, from, r, run, thread, scratch, 0);
            from = r;
            run = 0;
        }
        if (r->threads > 1) {
            if (thread < r->threads)
                run += kg_drain(job, r, thread, scratch);
        } else if (thread == 0) {
            kg_launch(job, r, 0, r->extent, scratch);
            run++;
        }
    }
    kg_meet(job, from, end, run, thread, scratch, thread != 0);
}

static void kg_work(kg_job *job, int thread)
{
    if (thread < job->threads) {
        unsigned state = kg_enter_float_state();
        kg_walk(job, thread);
        kg_leave_float_state(state);
    }
}

static kg_status kg_run(const kg_plan *plan, kg_pool *pool, void *workspace, size_t bytes, const void *const *inputs,
                        void *const *outputs)
{
    const kg_program *program = plan->program;
    uintptr_t at = ((uintptr_t)workspace + KG_ALIGNMENT - 1) & ~(uintptr_t)(KG_ALIGNMENT - 1);
    unsigned char *arena = (unsigned char *)at, *copies = arena + kg_rounded((int64_t)plan->arena_bytes);
    unsigned float_state;
    kg_job job;
    int32_t k, together;
    if (bytes < kg_workspace_bytes(plan))
        return KG_TOO_SMALL;
    float_state = kg_enter_float_state();
    job.plan = plan;
    job.pool = pool;
    job.scratch = copies + plan->copies_bytes;
    job.claims = (kg_counter *)(job.scratch + plan->scratch_bytes * (size_t)plan->threads);
    job.done = job.claims + plan->num_claims;
    job.operands = (void **)(job.done + plan->num_groups);
    for (k = 0; k < program->num_operands; k++) {
        const kg_place *place = plan->places + program->operands[k];
        const unsigned char *base;
        switch (place->space) {
        case KG_SPACE_ARENA:
            base = arena;
            break;
        case KG_SPACE_INPUT:
            base = inputs[place->index];
            break;
        case KG_SPACE_OUTPUT:
            base = plan->copies[place->index] >= 0 ? copies + plan->copies[place->index] : outputs[place->index];
            break;
        case KG_SPACE_DIM:
            base = (const unsigned char *)(plan->dims + place->index);
            break;
        default:
            base = plan->weights;
        }
        job.operands[k] = (void *)(uintptr_t)(base + place->offset);
    }
    together = plan->threads > 1 && pool != 0 && pool->threads > 1 && pool->process == getpid() &&
               atomic_exchange(&pool->busy, 1) == 0;
    if (together) {
        memset(job.claims, 0, ((size_t)plan->num_claims + (size_t)plan->num_groups) * sizeof(kg_counter));
        job.threads = plan->threads < pool->threads ? plan->threads : pool->threads;
        kg_open(pool, &job);
        kg_walk(&job, 0);
        kg_close(pool);
        atomic_store(&pool->busy, 0);
    } else {
        for (k = 0; k < plan->num_records; k++)
            kg_launch(&job, plan->records + k, 0, plan->records[k].extent, job.scratch);
    }
    kg_leave_float_state(float_state);
    /* Outputs that no step writes into their arrays. An output that replaces an input comes last: others may show the
       input's old content. */
    for (k = 0; k < program->num_outputs; k++) {
        const kg_place *place = plan->places + program->outputs[k];
        unsigned char *to = plan->copies[k] >= 0 ? copies + plan->copies[k] : outputs[k];
        const unsigned char *base = plan->weights;
        if (plan->direct[k])
            continue;
        if (place->space == KG_SPACE_ARENA)
            base = arena;
        else if (place->space == KG_SPACE_INPUT)
            base = inputs[place->index];
        else if (place->space == KG_SPACE_OUTPUT)
            base = plan->copies[place->index] >= 0 ? copies + plan->copies[place->index] : outputs[place->index];
        else if (place->space == KG_SPACE_DIM)
            base = (const unsigned char *)(plan->dims + place->index);
        memmove(to, base + place->offset, (size_t)plan->nbytes[program->outputs[k]]);
    }
    for (k = 0; k < program->num_outputs; k++)
        if (plan->copies[k] >= 0)
            memcpy(outputs[k], copies + plan->copies[k], (size_t)plan->nbytes[program->outputs[k]]);
    return KG_OK;
}

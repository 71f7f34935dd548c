/* Making a plan: where every buffer lies, how many threads share each step, where they meet. No memory is allocated:
   a plan and what is needed to make it lie in memory of the caller, whose size depends on the program alone. */

typedef struct {
    uintptr_t at, end;
} kg_memory;

static void *kg_take(kg_memory *memory, size_t count, size_t itemsize)
{
    uintptr_t at = memory->at;
    memory->at = at + (count * itemsize + 15) / 16 * 16;
    return (void *)at;
}

typedef struct {
    int64_t begin, end;
} kg_range;

/* What is needed while a plan is made. */
typedef struct {
    kg_plan *plan;
    const kg_program *program;
    int32_t *roots, *first, *last, *leader, *claimed;
    int64_t *offsets;
    uint8_t *donated;
    int32_t *group_of, *interval_first, *interval_last, *order, *merged, *placed;
    int64_t *interval_bytes, *position, *best;
    int32_t *counts;
    double *nanoseconds;
    kg_range *ranges[4];
} kg_planner;

static void kg_layout(kg_planner *p, kg_memory *memory, const kg_program *program)
{
    size_t buffers = (size_t)program->num_buffers + 1, steps = (size_t)program->num_steps + 1;
    size_t outputs = (size_t)program->num_outputs + 1, operands = (size_t)program->num_operands + 1;
    kg_plan *plan = p->plan = kg_take(memory, 1, sizeof(kg_plan));
    kg_place *places = kg_take(memory, buffers, sizeof(kg_place));
    int64_t *nbytes = kg_take(memory, buffers, 8), *dims = kg_take(memory, buffers, 8);
    int64_t *sizes = kg_take(memory, (size_t)program->num_sizes + 1, 8);
    kg_record *records = kg_take(memory, steps, sizeof(kg_record));
    int32_t *direct = kg_take(memory, outputs, 4), *donors = kg_take(memory, outputs, 4);
    int64_t *copies = kg_take(memory, outputs, 8);
    int k;
    p->program = program;
    p->roots = kg_take(memory, buffers, 4);
    p->first = kg_take(memory, buffers, 4);
    p->last = kg_take(memory, buffers, 4);
    p->leader = kg_take(memory, buffers, 4);
    p->claimed = kg_take(memory, buffers, 4);
    p->offsets = kg_take(memory, buffers, 8);
    p->donated = kg_take(memory, buffers, 1);
    p->group_of = kg_take(memory, buffers, 4);
    p->interval_first = kg_take(memory, buffers, 4);
    p->interval_last = kg_take(memory, buffers, 4);
    p->order = kg_take(memory, buffers, 4);
    p->merged = kg_take(memory, buffers, 4);
    p->placed = kg_take(memory, buffers, 4);
    p->interval_bytes = kg_take(memory, buffers, 8);
    p->position = kg_take(memory, buffers, 8);
    p->best = kg_take(memory, buffers, 8);
    p->counts = kg_take(memory, steps, 4);
    p->nanoseconds = kg_take(memory, steps, 8);
    for (k = 0; k < 4; k++)
        p->ranges[k] = kg_take(memory, operands, sizeof(kg_range));
    if (memory->at > memory->end)
        return; /* only the size was asked for */
    plan->places = places, plan->nbytes = nbytes, plan->dims = dims, plan->sizes = sizes, plan->records = records;
    plan->direct = direct, plan->donors = donors, plan->copies = copies;
}

static size_t kg_plan_bytes(const kg_program *program)
{
    kg_planner planner;
    kg_memory memory = {0, 0};
    kg_layout(&planner, &memory, program);
    return (size_t)memory.at + 16;
}

/* -- sizes ------------------------------------------------------------------------------------------------------- */
static kg_status kg_solve(const kg_program *program, const int64_t *const *shapes, int64_t *symbols)
{
    int32_t i, axis;
    memset(symbols, 0, KG_MAX_SYMBOLS * sizeof(int64_t));
    for (i = 0; i < program->num_solvers; i++) {
        const kg_solver *s = program->solvers + i;
        int64_t rest = shapes[s->input][s->axis] - s->shift;
        if (rest < 0 || rest % s->factor)
            return KG_WRONG_SHAPE;
        symbols[s->symbol] = rest / s->factor;
    }
    for (i = 0; i < program->num_inputs; i++) {
        const kg_buffer *buffer = program->buffers + program->inputs[i];
        for (axis = 0; axis < buffer->rank; axis++)
            if (kg_evaluate(program, program->shapes[buffer->shape + axis], symbols) != shapes[i][axis])
                return KG_WRONG_SHAPE;
    }
    return KG_OK;
}

static kg_status kg_measure(kg_planner *p)
{
    const kg_program *program = p->program;
    kg_plan *plan = p->plan;
    int32_t b, axis;
    for (b = 0; b < program->num_buffers; b++) {
        const kg_buffer *buffer = program->buffers + b;
        int64_t count = buffer->itemsize, value = 0;
        int32_t root = b;
        for (axis = 0; axis < buffer->rank; axis++) {
            int64_t size = kg_evaluate(program, program->shapes[buffer->shape + axis], plan->symbols);
            if (size < 0)
                return KG_WRONG_SHAPE;
            if (size > 0 && count > INT64_MAX / 2 / size)
                return KG_WRONG_SHAPE;
            count *= size;
        }
        plan->nbytes[b] = count;
        p->offsets[b] = 0;
        while (program->buffers[root].alias >= 0) {
            p->offsets[b] += kg_evaluate(program, program->buffers[root].offset, plan->symbols);
            root = program->buffers[root].alias;
        }
        p->roots[b] = root;
        if (buffer->kind == KG_BUFFER_DIM) {
            value = kg_evaluate(program, buffer->number, plan->symbols);
            kg_store_dim(plan->dims + b, buffer->dtype, value);
        }
    }
    return KG_OK;
}

/* -- places ------------------------------------------------------------------------------------------------------ */
static void kg_lifetimes(kg_planner *p)
{
    const kg_program *program = p->program;
    int32_t b, s, k, o;
    for (b = 0; b < program->num_buffers; b++) {
        p->first[b] = p->last[b] = p->leader[b] = p->claimed[b] = -1;
        p->donated[b] = 0;
    }
    for (s = 0; s < program->num_steps; s++) {
        const kg_step *step = program->steps + s;
        for (k = 0; k < step->num_operands; k++) {
            int32_t root = p->roots[program->operands[step->operands + k]];
            if (p->first[root] < 0)
                p->first[root] = s;
            p->last[root] = s;
        }
    }
    for (o = 0; o < program->num_outputs; o++) {
        int32_t out = program->outputs[o], root = p->roots[out];
        int whole = p->offsets[out] == 0 && p->plan->nbytes[out] == p->plan->nbytes[root];
        p->last[root] = program->num_steps;
        p->plan->direct[o] = program->buffers[root].kind == KG_BUFFER_TEMPORARY && whole && p->claimed[root] < 0;
        p->plan->donors[o] = p->plan->copies[o] = -1;
        if (p->plan->direct[o])
            p->claimed[root] = o;
    }
}

/* Whether position `input` is a place where position `output` of the step may be written. */
static int kg_is_inplace(const kg_program *program, const kg_step *step, int32_t output, int32_t input)
{
    int32_t k;
    for (k = 0; k < step->num_inplace; k++)
        if (program->inplace[step->inplace + 2 * k] == output && program->inplace[step->inplace + 2 * k + 1] == input)
            return 1;
    return 0;
}

static int kg_may_overwrite(kg_planner *p, int32_t index, int32_t root, int32_t source)
{
    const kg_program *program = p->program;
    const kg_step *step = program->steps + index;
    const int32_t *operands = program->operands + step->operands;
    int32_t inputs = step->num_operands - step->num_outputs, i, o;
    for (i = 0; i < inputs; i++) {
        int fits = 0;
        if (p->roots[operands[i]] != source)
            continue;
        for (o = inputs; o < step->num_operands; o++)
            fits |= operands[o] == root && kg_is_inplace(program, step, o, i);
        if (!fits || operands[i] != source)
            return 0;
    }
    return 1;
}

/* The temporary that the step which makes buffer `root` may overwrite with it, or -1. */
static int32_t kg_overwritten(kg_planner *p, int32_t root)
{
    const kg_program *program = p->program;
    int32_t index = p->first[root], k;
    const kg_step *step = program->steps + index;
    const int32_t *operands = program->operands + step->operands;
    for (k = 0; k < step->num_inplace; k++) {
        int32_t out = operands[program->inplace[step->inplace + 2 * k]];
        int32_t src = operands[program->inplace[step->inplace + 2 * k + 1]];
        if (out == root && p->roots[src] == src && program->buffers[src].kind == KG_BUFFER_TEMPORARY &&
            p->last[src] == index && p->plan->nbytes[src] == p->plan->nbytes[root] && p->plan->nbytes[root] > 0 &&
            kg_may_overwrite(p, index, root, src))
            return src;
    }
    return -1;
}

static void kg_donate(kg_planner *p)
{
    const kg_program *program = p->program;
    int32_t k;
    for (k = 0; k < program->num_donations; k++) {
        int32_t number = program->donations[2 * k], output = program->donations[2 * k + 1];
        int32_t source = program->inputs[number], root = p->roots[program->outputs[output]];
        int32_t read = p->last[source], begin = root, made_of, written;
        if (p->claimed[root] != output || p->first[root] < 0)
            continue;
        /* Several steps may change the array one after the other. */
        while ((made_of = kg_overwritten(p, begin)) >= 0)
            begin = made_of;
        if (p->first[begin] != read)
            begin = root;
        written = p->first[begin];
        if (written > read || (written == read && kg_may_overwrite(p, written, begin, source))) {
            p->plan->donors[output] = number;
            p->donated[root] = 1;
            for (made_of = root; made_of != begin;) {
                made_of = kg_overwritten(p, made_of);
                p->donated[made_of] = 1;
                p->leader[made_of] = root;
            }
        }
    }
}

static int32_t kg_leader(const kg_planner *p, int32_t root)
{
    return p->leader[root] < 0 ? root : p->leader[root];
}

/* Let outputs overwrite inputs that die at the same step, where the step allows it. */
static void kg_merge_in_place(kg_planner *p)
{
    const kg_program *program = p->program;
    const int64_t *nbytes = p->plan->nbytes;
    int32_t s, k, i;
    for (i = 0; i < program->num_buffers; i++)
        p->group_of[i] = p->last[i]; /* here: the last use of a group, by leader */
    for (s = 0; s < program->num_steps; s++) {
        const kg_step *step = program->steps + s;
        const int32_t *operands = program->operands + step->operands;
        int32_t inputs = step->num_operands - step->num_outputs, overwritten = 0;
        for (k = 0; k < step->num_inplace; k++) {
            int32_t o = program->inplace[step->inplace + 2 * k], source = program->inplace[step->inplace + 2 * k + 1];
            int32_t out = operands[o], src = operands[source];
            int32_t out_root = p->roots[out], src_root = p->roots[src], leader = kg_leader(p, src_root);
            int blocked = 0;
            if (program->buffers[out_root].kind != KG_BUFFER_TEMPORARY ||
                program->buffers[src_root].kind != KG_BUFFER_TEMPORARY || p->leader[out_root] >= 0 ||
                p->donated[out_root] || out_root == leader || p->first[out_root] != s || p->group_of[leader] != s ||
                p->offsets[out] || p->offsets[src] || nbytes[out] != nbytes[out_root] || nbytes[out] != nbytes[src] ||
                nbytes[out] != nbytes[src_root] || nbytes[out] != nbytes[leader] || nbytes[out] <= 0)
                continue;
            for (i = 0; i < overwritten; i++)
                blocked |= p->order[i] == leader;
            for (i = 0; i < inputs && !blocked; i++)
                blocked = kg_leader(p, p->roots[operands[i]]) == leader && !kg_is_inplace(program, step, o, i);
            if (blocked)
                continue;
            p->leader[out_root] = leader;
            p->order[overwritten++] = leader;
            if (p->last[out_root] > p->group_of[leader])
                p->group_of[leader] = p->last[out_root];
        }
    }
}

static int64_t kg_rounded(int64_t bytes)
{
    return (bytes + KG_ALIGNMENT - 1) / KG_ALIGNMENT * KG_ALIGNMENT;
}

static int kg_before(const kg_planner *p, int32_t a, int32_t b, int rule)
{
    int64_t size_a = p->interval_bytes[a], size_b = p->interval_bytes[b];
    int32_t first_a = p->interval_first[a], first_b = p->interval_first[b];
    if (rule == 0) /* by size */
        return size_a != size_b ? size_a > size_b : first_a <= first_b;
    if (rule == 1) /* by time */
        return first_a != first_b ? first_a < first_b : size_a >= size_b;
    size_a *= p->interval_last[a] - first_a + 1;
    size_b *= p->interval_last[b] - first_b + 1;
    return size_a != size_b ? size_a > size_b : first_a <= first_b;
}

static void kg_sort(kg_planner *p, int32_t count, int rule)
{
    int32_t width, begin, i;
    for (i = 0; i < count; i++)
        p->order[i] = i;
    for (width = 1; width < count; width *= 2) {
        for (begin = 0; begin < count; begin += 2 * width) {
            int32_t a = begin, middle = begin + width < count ? begin + width : count, b = middle;
            int32_t end = begin + 2 * width < count ? begin + 2 * width : count;
            for (i = begin; i < end; i++)
                p->merged[i] = a < middle && (b >= end || kg_before(p, p->order[a], p->order[b], rule)) ? p->order[a++]
                                                                                                      : p->order[b++];
        }
        memcpy(p->order, p->merged, (size_t)count * sizeof(int32_t));
    }
}

/* Place the intervals in `order`, each in the smallest gap that holds it; gives the size of the arena. */
static int64_t kg_place_intervals(kg_planner *p, int32_t count)
{
    int32_t i, k, num_placed = 0;
    int64_t peak = 0;
    for (i = 0; i < count; i++) {
        int32_t index = p->order[i];
        int64_t size = kg_rounded(p->interval_bytes[index]), position = 0, chosen = -1, smallest = 0;
        p->position[index] = 0;
        if (size == 0)
            continue;
        for (k = 0; k < num_placed; k++) {
            int32_t other = p->placed[k];
            int64_t gap = p->position[other] - position, end = p->position[other] + kg_rounded(p->interval_bytes[other]);
            if (p->interval_first[other] > p->interval_last[index] || p->interval_last[other] < p->interval_first[index])
                continue;
            if (gap >= size && (chosen < 0 || gap < smallest))
                chosen = position, smallest = gap;
            if (end > position)
                position = end;
        }
        if (chosen < 0)
            chosen = position;
        p->position[index] = chosen;
        if (chosen + size > peak)
            peak = chosen + size;
        for (k = num_placed++; k > 0 && p->position[p->placed[k - 1]] > chosen; k--)
            p->placed[k] = p->placed[k - 1];
        p->placed[k] = index;
    }
    return peak;
}

/* Give every group of temporaries that is no output its place in the arena. */
static void kg_plan_arena(kg_planner *p)
{
    const kg_program *program = p->program;
    int32_t b, count = 0;
    int64_t peak = -1;
    int rule;
    for (b = 0; b < program->num_buffers; b++)
        p->group_of[b] = -1;
    for (b = 0; b < program->num_buffers; b++) {
        int32_t leader = kg_leader(p, b), first = p->first[b] < 0 ? 0 : p->first[b];
        if (p->last[b] < 0 || program->buffers[b].kind != KG_BUFFER_TEMPORARY || program->buffers[b].alias >= 0 ||
            p->claimed[leader] >= 0)
            continue;
        if (p->group_of[leader] < 0) {
            p->interval_bytes[count] = p->plan->nbytes[leader];
            p->interval_first[count] = first;
            p->interval_last[count] = p->last[b];
            p->group_of[leader] = count++;
        }
        if (first < p->interval_first[p->group_of[leader]])
            p->interval_first[p->group_of[leader]] = first;
        if (p->last[b] > p->interval_last[p->group_of[leader]])
            p->interval_last[p->group_of[leader]] = p->last[b];
    }
    for (rule = 0; rule < 3; rule++) {
        int64_t size;
        kg_sort(p, count, rule);
        size = kg_place_intervals(p, count);
        if (peak < 0 || size < peak) {
            peak = size;
            memcpy(p->best, p->position, (size_t)count * sizeof(int64_t));
        }
    }
    p->plan->arena_bytes = (size_t)peak;
}

static void kg_place_buffers(kg_planner *p)
{
    const kg_program *program = p->program;
    int32_t b, o;
    kg_lifetimes(p);
    kg_donate(p);
    kg_merge_in_place(p);
    for (b = 0; b < program->num_buffers; b++)
        if (p->leader[b] >= 0 && p->claimed[b] >= 0)
            p->claimed[p->leader[b]] = p->claimed[b];
    kg_plan_arena(p);
    for (b = 0; b < program->num_buffers; b++) {
        kg_place *place = p->plan->places + b;
        int32_t root = p->roots[b], leader = kg_leader(p, root);
        const kg_buffer *owner = program->buffers + root;
        place->offset = p->offsets[b];
        place->index = owner->number;
        switch (owner->kind) {
        case KG_BUFFER_TEMPORARY:
            place->space = p->claimed[leader] >= 0 ? KG_SPACE_OUTPUT : KG_SPACE_ARENA;
            place->index = p->claimed[leader];
            if (place->space == KG_SPACE_ARENA && p->group_of[leader] >= 0)
                place->offset += p->best[p->group_of[leader]];
            break;
        case KG_BUFFER_INPUT:
            place->space = KG_SPACE_INPUT;
            for (o = 0; o < program->num_outputs; o++)
                if (p->plan->donors[o] == owner->number)
                    place->space = KG_SPACE_OUTPUT, place->index = o;
            break;
        case KG_BUFFER_PARAM:
            place->space = KG_SPACE_PARAM;
            place->offset += program->params[owner->number];
            break;
        case KG_BUFFER_CONSTANT:
            place->space = KG_SPACE_CONSTANT;
            place->offset += owner->data;
            break;
        default:
            place->space = KG_SPACE_DIM;
            place->index = root;
        }
    }
    /* Donated outputs that cannot be written over their inputs are written beside the arena and copied at the end. */
    p->plan->copies_bytes = 0;
    for (b = 0; b < program->num_donations; b++) {
        int32_t output = program->donations[2 * b + 1];
        if (p->plan->donors[output] < 0) {
            p->plan->copies[output] = (int64_t)p->plan->copies_bytes;
            p->plan->copies_bytes += (size_t)kg_rounded(p->plan->nbytes[program->outputs[output]]);
        }
    }
}

/* -- threads ----------------------------------------------------------------------------------------------------- */
/* The constants of kgraph.runtime.schedule, which says what they mean. */
static double kg_nanoseconds(int64_t flops, int64_t bytes)
{
    double compute = (double)flops / 40.0, memory = (double)bytes / 16.0;
    return compute > memory ? compute : memory;
}

static double kg_root(double x)
{
    double guess = x > 1 ? x : 1;
    int k;
    for (k = 0; k < 64; k++) {
        double next = 0.5 * (guess + x / guess);
        if (next >= guess)
            break;
        guess = next;
    }
    return guess;
}

static void kg_choose_threads(kg_planner *p, int limit)
{
    const kg_program *program = p->program;
    double saved = 0;
    int32_t s, most = 1;
    for (s = 0; s < program->num_steps; s++) {
        const kg_step *step = program->steps + s;
        int64_t extent = kg_evaluate(program, step->extent, p->plan->symbols);
        double time = kg_nanoseconds(kg_evaluate(program, step->flops, p->plan->symbols),
                                     kg_evaluate(program, step->bytes, p->plan->symbols));
        double threads = limit, best = kg_root(time / 150.0);
        p->nanoseconds[s] = time;
        threads = (double)extent < threads ? (double)extent : threads;
        threads = time / 1500.0 < threads ? time / 1500.0 : threads;
        threads = best < threads ? best : threads;
        p->counts[s] = extent <= 0 ? 0 : threads < 1 ? 1 : (int32_t)threads;
        if (p->counts[s] > 1)
            saved += time * (1 - 1.0 / p->counts[s]) - p->counts[s] * 150.0;
    }
    for (s = 0; s < program->num_steps; s++) {
        if (saved <= 4000.0 && p->counts[s] > 1)
            p->counts[s] = 1;
        most = p->counts[s] > most ? p->counts[s] : most;
    }
    p->plan->threads = most;
}

static int64_t kg_least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* How a step that several threads share is cut; see kgraph/runtime/schedule.py. */
static void kg_choose_chunks(kg_record *r, double nanoseconds, int64_t grain)
{
    int64_t threads = r->threads, chunks = kg_least((int64_t)(nanoseconds / (threads * 15000.0)), 4);
    if (grain > 1) {
        int64_t grains = r->extent / grain;
        int even = grains > 0 && (grains % threads == 0 || grains >= 8 * threads);
        chunks = even ? kg_least(chunks, grains / threads) : 1;
        r->grain = even ? grain : 1;
    } else {
        chunks = kg_least(chunks, r->extent / threads);
        r->grain = r->extent / (64 * threads * (chunks < 1 ? 1 : chunks)) >= 16 ? 64 : 1;
    }
    r->chunks = chunks < 1 ? 1 : chunks;
}

static void kg_make_records(kg_planner *p)
{
    const kg_program *program = p->program;
    kg_plan *plan = p->plan;
    int64_t *sizes = plan->sizes;
    int32_t s, k;
    plan->num_records = plan->num_claims = 0;
    plan->scratch_bytes = 0;
    for (s = 0; s < program->num_steps; s++) {
        const kg_step *step = program->steps + s;
        int32_t threads = p->counts[s];
        kg_record *r = plan->records + plan->num_records;
        int64_t scratch = kg_rounded(kg_evaluate(program, step->scratch, plan->symbols));
        if (threads == 0)
            continue;
        memset(r, 0, sizeof(*r));
        r->kernel = step->kernel;
        r->sizes = sizes;
        r->operands = step->operands;
        r->extent = kg_evaluate(program, step->extent, plan->symbols);
        r->threads = threads;
        r->chunks = r->grain = 1;
        if (threads > 1) {
            kg_choose_chunks(r, p->nanoseconds[s], step->grain);
            r->claims = plan->num_claims;
            plan->num_claims += threads;
        }
        for (k = 0; k < step->num_sizes; k++)
            *sizes++ = kg_evaluate(program, program->sizes[step->sizes + k], plan->symbols);
        plan->scratch_bytes = scratch > (int64_t)plan->scratch_bytes ? (size_t)scratch : plan->scratch_bytes;
        p->counts[plan->num_records++] = s; /* here: the step of each record */
    }
    memset(plan->records + plan->num_records, 0, sizeof(kg_record));
}

/* The bytes of a buffer in one address space of the arena and all outputs; empty for what no step writes. */
static kg_range kg_written_range(const kg_plan *plan, int32_t buffer)
{
    const kg_place *place = plan->places + buffer;
    kg_range range = {0, 0};
    if (place->space == KG_SPACE_ARENA || place->space == KG_SPACE_OUTPUT) {
        range.begin = place->offset + (place->space == KG_SPACE_OUTPUT ? (int64_t)(1 + place->index) << 48 : 0);
        range.end = range.begin + plan->nbytes[buffer];
    }
    return range;
}

static int kg_overlaps(kg_range range, const kg_range *others, int32_t count)
{
    int32_t i;
    for (i = 0; i < count; i++)
        if (range.begin < others[i].end && others[i].begin < range.end)
            return 1;
    return 0;
}

/* Any two steps that touch the same bytes, one of them writing, must have a barrier in between, unless both run on
   thread 0. ranges: reads and writes since the last barrier by all threads, then those by thread 0 alone. */
static void kg_place_barriers(kg_planner *p)
{
    const kg_program *program = p->program;
    kg_plan *plan = p->plan;
    int32_t count[4] = {0, 0, 0, 0}, r, k;
    int64_t chunks = 0;
    plan->num_groups = 0;
    if (plan->threads < 2)
        return;
    for (r = 0; r <= plan->num_records; r++) {
        kg_record *record = plan->records + r;
        const kg_step *step = program->steps + p->counts[r];
        int conflict = 0, shared = record->threads > 1, at = shared ? 0 : 2;
        int32_t inputs = r < plan->num_records ? step->num_operands - step->num_outputs : 0;
        int32_t operands = r < plan->num_records ? step->num_operands : 0;
        for (k = 0; k < operands && !conflict; k++) {
            kg_range range = kg_written_range(plan, program->operands[step->operands + k]);
            if (range.begin == range.end)
                continue;
            conflict = kg_overlaps(range, p->ranges[1], count[1]) || (shared && kg_overlaps(range, p->ranges[3], count[3]));
            if (k >= inputs)
                conflict = conflict || kg_overlaps(range, p->ranges[0], count[0]) ||
                           (shared && kg_overlaps(range, p->ranges[2], count[2]));
        }
        if (conflict || r == plan->num_records) {
            record->barrier = r < plan->num_records;
            record->group = plan->num_groups++;
            record->group_chunks = chunks;
            chunks = 0;
            memset(count, 0, sizeof(count));
        }
        for (k = 0; k < operands; k++) {
            kg_range range = kg_written_range(plan, program->operands[step->operands + k]);
            int list = at + (k >= inputs);
            if (range.begin != range.end)
                p->ranges[list][count[list]++] = range;
        }
        chunks += record->threads * record->chunks;
    }
}

static kg_status kg_make_plan(void *memory, size_t bytes, const kg_program *program, const unsigned char *weights,
                              const int64_t *const *shapes, int max_threads, kg_plan **result)
{
    kg_planner planner;
    kg_memory rest;
    int64_t symbols[KG_MAX_SYMBOLS];
    kg_status status = kg_solve(program, shapes, symbols);
    if (status != KG_OK)
        return status;
    rest.at = ((uintptr_t)memory + 15) & ~(uintptr_t)15;
    rest.end = (uintptr_t)memory + bytes;
    if (bytes < kg_plan_bytes(program))
        return KG_TOO_SMALL;
    kg_layout(&planner, &rest, program);
    planner.plan->program = program;
    planner.plan->weights = weights;
    memcpy(planner.plan->symbols, symbols, sizeof(symbols));
    status = kg_measure(&planner);
    if (status != KG_OK)
        return status;
    kg_place_buffers(&planner);
    kg_choose_threads(&planner, max_threads);
    kg_make_records(&planner);
    kg_place_barriers(&planner);
    *result = planner.plan;
    return KG_OK;
}

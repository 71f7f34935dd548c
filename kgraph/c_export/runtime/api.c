/* The public functions. KG_API gives them the model's name. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__x86_64__)
/* Bit sets of what a level needs, as cpuid reports them: leaf 1 ecx, leaf 7 ebx, leaf 0x80000001 ecx. */
static int kg_cpu_has(const kg_level *level)
{
    unsigned a, b, c, d, one = 0, seven = 0, extended = 0, state = 0;
    if (__get_cpuid(1, &a, &b, &c, &d))
        one = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d))
        seven = b;
    if (__get_cpuid(0x80000001, &a, &b, &c, &d))
        extended = c;
    if (one & bit_OSXSAVE) {
        unsigned high;
        __asm__ __volatile__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
    }
    if ((level->leaf7_ebx & bit_AVX512F) && (state & 0xe6) != 0xe6)
        return 0;
    if ((level->leaf1_ecx & bit_AVX) && (state & 0x6) != 0x6)
        return 0;
    return (one & level->leaf1_ecx) == level->leaf1_ecx && (seven & level->leaf7_ebx) == level->leaf7_ebx &&
           (extended & level->extended_ecx) == level->extended_ecx;
}
#else
static int kg_cpu_has(const kg_level *level)
{
    (void)level;
    return 1;
}
#endif

static _Atomic(const kg_level *) kg_chosen;
static _Atomic(const unsigned char *) kg_opened;

static const kg_level *kg_choose_level(void)
{
    const kg_level *chosen = atomic_load_explicit(&kg_chosen, memory_order_acquire);
    int k;
    if (chosen)
        return chosen;
    for (k = 0; k < KG_NUM_LEVELS; k++)
        if (kg_cpu_has(kg_levels + k)) {
            atomic_store_explicit(&kg_chosen, kg_levels + k, memory_order_release);
            return kg_levels + k;
        }
    return 0;
}

static const unsigned char *kg_weights(void)
{
#if KG_WEIGHTS_INSIDE
    return kg_weights_inside;
#else
    return atomic_load_explicit(&kg_opened, memory_order_acquire);
#endif
}

const char *KG_API(status_text)(kg_status status)
{
    static const char *const texts[] = {
        "no error", "invalid argument", "the model takes no inputs of these shapes",
        "the given memory is smaller than asked for", "no code for this processor", "the weights were not opened",
        "no weights, or those of another model", "a file cannot be read or written",
        "the system refused a thread or a lock"};
    return (unsigned)status < sizeof(texts) / sizeof(*texts) ? texts[status] : "unknown status";
}

const char *KG_API(level)(void)
{
    const kg_level *level = kg_choose_level();
    return level ? level->name : "";
}

int KG_API(num_inputs)(void)
{
    return KG_NUM_INPUTS;
}

int KG_API(num_outputs)(void)
{
    return KG_NUM_OUTPUTS;
}

const kg_tensor_info *KG_API(input)(int number)
{
    return number >= 0 && number < KG_NUM_INPUTS ? kg_input_infos + number : 0;
}

const kg_tensor_info *KG_API(output)(int number)
{
    return number >= 0 && number < KG_NUM_OUTPUTS ? kg_output_infos + number : 0;
}

/* -- weights ----------------------------------------------------------------------------------------------------- */
#if !KG_WEIGHTS_INSIDE
kg_status KG_API(use_weights)(const void *data, size_t bytes)
{
    if (data == 0 || (uintptr_t)data % KG_ALIGNMENT)
        return KG_INVALID_ARGUMENT;
    if (bytes != KG_WEIGHTS_BYTES || memcmp(data, kg_weights_id, sizeof(kg_weights_id)))
        return KG_WRONG_WEIGHTS;
    atomic_store_explicit(&kg_opened, data, memory_order_release);
    return KG_OK;
}

kg_status KG_API(open_weights)(const char *path)
{
    struct stat about;
    void *data;
    int file, error;
    if (path == 0)
        return KG_INVALID_ARGUMENT;
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return KG_IO;
    if (fstat(file, &about) || about.st_size != KG_WEIGHTS_BYTES) {
        close(file);
        return KG_WRONG_WEIGHTS;
    }
    data = mmap(0, KG_WEIGHTS_BYTES, PROT_READ, MAP_PRIVATE, file, 0);
    error = errno;
    close(file);
    if (data == MAP_FAILED) {
        errno = error;
        return KG_IO;
    }
    if (KG_API(use_weights)(data, KG_WEIGHTS_BYTES) != KG_OK) {
        munmap(data, KG_WEIGHTS_BYTES);
        return KG_WRONG_WEIGHTS;
    }
    return KG_OK;
}
#endif

/* -- plans ------------------------------------------------------------------------------------------------------- */
size_t KG_API(plan_bytes)(void)
{
    const kg_level *level = kg_choose_level();
    size_t most = 0;
    int k;
    for (k = 0; level && k < KG_NUM_FORMS; k++) {
        size_t bytes = kg_plan_bytes(level->forms[k]);
        most = bytes > most ? bytes : most;
    }
    return most;
}

kg_status KG_API(plan)(void *memory, size_t bytes, const int64_t *const *input_shapes, int max_threads, kg_plan **plan)
{
    const kg_level *level = kg_choose_level();
    const int64_t *shapes[KG_NUM_INPUTS + KG_NUM_STATES + 1] = {0};
    kg_status status = KG_WRONG_SHAPE;
    int k;
    if (memory == 0 || plan == 0 || (input_shapes == 0 && KG_NUM_INPUTS) || max_threads < 1)
        return KG_INVALID_ARGUMENT;
    if (level == 0)
        return KG_UNSUPPORTED_CPU;
    if (kg_weights() == 0)
        return KG_NO_WEIGHTS;
    for (k = 0; k < KG_NUM_INPUTS; k++) {
        if (input_shapes[k] == 0 && kg_input_infos[k].rank)
            return KG_INVALID_ARGUMENT;
        shapes[k] = input_shapes[k];
    }
#if KG_NUM_STATES
    for (k = 0; k < KG_NUM_STATES; k++)
        if (kg_states[k].input >= 0)
            shapes[kg_states[k].input] = kg_states[k].info.shape;
#endif
    for (k = 0; k < KG_NUM_FORMS && status == KG_WRONG_SHAPE; k++)
        status = kg_make_plan(memory, bytes, level->forms[k], kg_weights(), shapes, max_threads, plan);
    return status;
}

size_t KG_API(workspace_bytes)(const kg_plan *plan)
{
    return plan ? kg_workspace_bytes(plan) : 0;
}

size_t KG_API(output_bytes)(const kg_plan *plan, int number)
{
    return plan && number >= 0 && number < KG_NUM_OUTPUTS ? (size_t)plan->nbytes[plan->program->outputs[number]] : 0;
}

kg_status KG_API(output_shape)(const kg_plan *plan, int number, int64_t *shape)
{
    const kg_buffer *buffer;
    int axis;
    if (plan == 0 || shape == 0 || number < 0 || number >= KG_NUM_OUTPUTS)
        return KG_INVALID_ARGUMENT;
    buffer = plan->program->buffers + plan->program->outputs[number];
    for (axis = 0; axis < buffer->rank; axis++)
        shape[axis] = kg_evaluate(plan->program, plan->program->shapes[buffer->shape + axis], plan->symbols);
    return KG_OK;
}

/* -- threads ----------------------------------------------------------------------------------------------------- */
size_t KG_API(pool_bytes)(void)
{
    return kg_pool_size();
}

kg_status KG_API(pool_start)(void *memory, size_t bytes, int threads, kg_pool **pool)
{
    return pool ? kg_pool_begin(memory, bytes, threads, pool) : KG_INVALID_ARGUMENT;
}

void KG_API(pool_stop)(kg_pool *pool)
{
    kg_pool_end(pool);
}

static kg_status kg_check_call(const kg_plan *plan, const kg_pool *pool, const void *workspace, const void *const *inputs,
                               void *const *outputs)
{
    int k;
    if (plan == 0 || workspace == 0 || (inputs == 0 && KG_NUM_INPUTS) || (outputs == 0 && KG_NUM_OUTPUTS))
        return KG_INVALID_ARGUMENT;
    if (pool != 0 && pool->size != (int)sizeof(kg_pool))
        return KG_INVALID_ARGUMENT; /* started by a library of another version */
    for (k = 0; k < KG_NUM_INPUTS; k++)
        if (inputs[k] == 0 && plan->nbytes[plan->program->inputs[k]])
            return KG_INVALID_ARGUMENT;
    for (k = 0; k < KG_NUM_OUTPUTS; k++)
        if (outputs[k] == 0 && plan->nbytes[plan->program->outputs[k]])
            return KG_INVALID_ARGUMENT;
    return KG_OK;
}

#if KG_NUM_STATES == 0
kg_status KG_API(run)(const kg_plan *plan, kg_pool *pool, void *workspace, size_t workspace_bytes,
                      const void *const *inputs, void *const *outputs)
{
    kg_status status = kg_check_call(plan, pool, workspace, inputs, outputs);
    return status != KG_OK ? status : kg_run(plan, pool, workspace, workspace_bytes, inputs, outputs);
}
#else
/* -- training ---------------------------------------------------------------------------------------------------- */
int KG_API(num_states)(void)
{
    return KG_NUM_STATES;
}

const kg_tensor_info *KG_API(state_info)(int number)
{
    return number >= 0 && number < KG_NUM_STATES ? &kg_states[number].info : 0;
}

size_t KG_API(state_bytes)(void)
{
    return KG_STATE_BYTES + KG_ALIGNMENT;
}

static unsigned char *kg_state_begin(const void *state)
{
    return (unsigned char *)(((uintptr_t)state + KG_ALIGNMENT - 1) & ~(uintptr_t)(KG_ALIGNMENT - 1));
}

kg_status KG_API(state_init)(void *state, size_t bytes)
{
    int k;
    if (state == 0)
        return KG_INVALID_ARGUMENT;
    if (bytes < KG_STATE_BYTES + KG_ALIGNMENT)
        return KG_TOO_SMALL;
    if (kg_weights() == 0)
        return KG_NO_WEIGHTS;
    for (k = 0; k < KG_NUM_STATES; k++)
        memcpy(kg_state_begin(state) + kg_states[k].at, kg_weights() + kg_states[k].initial, kg_states[k].bytes);
    return KG_OK;
}

void *KG_API(state_data)(void *state, int number)
{
    return state && number >= 0 && number < KG_NUM_STATES ? kg_state_begin(state) + kg_states[number].at : 0;
}

#if KG_IS_STEP
#define KG_RUN train_step
#else
#define KG_RUN run
#endif
#define KG_EXPANDED(name) KG_API(name)

kg_status KG_EXPANDED(KG_RUN)(const kg_plan *plan, kg_pool *pool, void *workspace, size_t workspace_bytes, void *state,
                             const void *const *inputs, void *const *outputs)
{
    const void *all_inputs[KG_NUM_INPUTS + KG_NUM_STATES];
    void *all_outputs[KG_NUM_OUTPUTS + KG_NUM_STATES];
    kg_status status = kg_check_call(plan, pool, workspace, inputs, outputs);
    int k;
    if (status != KG_OK || state == 0)
        return status != KG_OK ? status : KG_INVALID_ARGUMENT;
    for (k = 0; k < KG_NUM_INPUTS; k++)
        all_inputs[k] = inputs[k];
    for (k = 0; k < KG_NUM_OUTPUTS; k++)
        all_outputs[k] = outputs[k];
    for (k = 0; k < KG_NUM_STATES; k++) {
        void *data = kg_state_begin(state) + kg_states[k].at;
        if (kg_states[k].input >= 0)
            all_inputs[kg_states[k].input] = data;
        if (kg_states[k].output >= 0)
            all_outputs[kg_states[k].output] = data;
    }
    return kg_run(plan, pool, workspace, workspace_bytes, all_inputs, all_outputs);
}

/* The state as a safetensors file: the length of the header, the header, the tensors one after another. */
kg_status KG_API(save_weights)(const void *state, const char *path)
{
    uint64_t length = sizeof(kg_state_header) - 1;
    FILE *file;
    int k, failed;
    if (state == 0 || path == 0)
        return KG_INVALID_ARGUMENT;
    file = fopen(path, "wb");
    if (file == 0)
        return KG_IO;
    failed = fwrite(&length, 8, 1, file) != 1 || fwrite(kg_state_header, length, 1, file) != 1;
    for (k = 0; k < KG_NUM_STATES && !failed; k++)
        if (kg_states[k].bytes)
            failed = fwrite(kg_state_begin(state) + kg_states[k].at, kg_states[k].bytes, 1, file) != 1;
    failed |= fclose(file) != 0;
    return failed ? KG_IO : KG_OK;
}

/* Where the data of a tensor begins in a safetensors file of `bytes` bytes; null where it has no such tensor. */
static const unsigned char *kg_find_tensor(const unsigned char *file, size_t bytes, const kg_state *state)
{
    static const char offsets[] = "\"data_offsets\":[";
    const char *name = state->info.name, *text = (const char *)file + 8;
    size_t length = strlen(name), at, header;
    uint64_t stated;
    memcpy(&stated, file, 8);
    if (stated > bytes - 8)
        return 0;
    header = (size_t)stated;
    for (at = 0; at + length + 4 < header; at++) {
        size_t k = at + length + 4;
        uint64_t begin = 0, end = 0;
        if (text[at] != '"' || memcmp(text + at + 1, name, length) || memcmp(text + at + 1 + length, "\":{", 3))
            continue;
        while (k < header && text[k] != '}' && (header - k < sizeof(offsets) || memcmp(text + k, offsets, sizeof(offsets) - 1)))
            k++;
        for (k += sizeof(offsets) - 1; k < header && text[k] >= '0' && text[k] <= '9' && begin < UINT64_MAX / 16; k++)
            begin = begin * 10 + (uint64_t)(text[k] - '0');
        for (k += 1; k < header && text[k] >= '0' && text[k] <= '9' && end < UINT64_MAX / 16; k++)
            end = end * 10 + (uint64_t)(text[k] - '0');
        if (end < begin || end - begin != state->bytes || end > bytes - 8 - header)
            return 0;
        return file + 8 + header + begin;
    }
    return 0;
}

/* Every tensor of the state is read by its name; others in the file do not matter. */
kg_status KG_API(load_weights)(void *state, const char *path)
{
    struct stat about;
    unsigned char *content;
    kg_status status = KG_OK;
    int file, error, k;
    if (state == 0 || path == 0)
        return KG_INVALID_ARGUMENT;
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return KG_IO;
    if (fstat(file, &about) || about.st_size < 8) {
        close(file);
        return KG_WRONG_WEIGHTS;
    }
    content = mmap(0, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    error = errno;
    close(file);
    if (content == MAP_FAILED) {
        errno = error;
        return KG_IO;
    }
    for (k = 0; k < KG_NUM_STATES && status == KG_OK; k++)
        if (kg_find_tensor(content, (size_t)about.st_size, kg_states + k) == 0)
            status = KG_WRONG_WEIGHTS;
    for (k = 0; k < KG_NUM_STATES && status == KG_OK; k++)
        memcpy(kg_state_begin(state) + kg_states[k].at, kg_find_tensor(content, (size_t)about.st_size, kg_states + k),
               kg_states[k].bytes);
    munmap(content, (size_t)about.st_size);
    return status;
}

/* Metrics as they are where an epoch begins. */
kg_status KG_API(reset_metrics)(void *state)
{
    int k;
    if (state == 0)
        return KG_INVALID_ARGUMENT;
    for (k = 0; k < KG_NUM_STATES; k++)
        if (kg_states[k].reset >= 0)
            memcpy(kg_state_begin(state) + kg_states[k].at, kg_weights() + kg_states[k].reset, kg_states[k].bytes);
    return KG_OK;
}
#endif

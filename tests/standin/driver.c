/* The driver's functions that the compiled build calls, on any thread. Each call is logged; what it answers is set by the
 * test, which can also hold launches: they are logged, and return when they are released. */

#include <pthread.h>
#include <stddef.h>
#include <string.h>

enum { GRAPH_LAUNCH, EVENT_RECORD, EVENT_QUERY, STREAM_QUERY, STREAM_WAIT, SET_COPY, SET_CONTEXT, KINDS };

typedef struct { /* CUDA_MEMCPY3D */
    size_t src_x, src_y, src_z, src_lod;
    int src_memory_type;
    const void *src_host;
    unsigned long long src_device;
    void *src_array, *src_reserved;
    size_t src_pitch, src_height;
    size_t dst_x, dst_y, dst_z, dst_lod;
    int dst_memory_type;
    void *dst_host;
    unsigned long long dst_device;
    void *dst_array, *dst_reserved;
    size_t dst_pitch, dst_height;
    size_t width, height, depth;
} Memcpy3D;

typedef struct {
    long kind;
    size_t a, b;
    unsigned long long source, destination;
    size_t bytes;
    int is_plain; /* device memory on both sides, one row */
} Call;

static Call calls[4096];
static long count;
static int answers[KINDS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int is_held;
static long held;

static int noted(long kind, const void *a, const void *b, const Memcpy3D *copy) {
    pthread_mutex_lock(&mutex);
    if (count < (long)(sizeof calls / sizeof *calls)) {
        Call *call = &calls[count];
        memset(call, 0, sizeof *call);
        call->kind = kind;
        call->a = (size_t)a;
        call->b = (size_t)b;
        if (copy != NULL) {
            call->source = copy->src_device;
            call->destination = copy->dst_device;
            call->bytes = copy->width;
            call->is_plain = copy->src_memory_type == 2 && copy->dst_memory_type == 2 && copy->height == 1 && copy->depth == 1;
        }
        count++;
    }
    if (kind == GRAPH_LAUNCH && is_held) {
        held++;
        pthread_cond_broadcast(&changed);
        while (is_held) pthread_cond_wait(&changed, &mutex);
        held--;
    }
    int answer = answers[kind];
    pthread_mutex_unlock(&mutex);
    return answer;
}

int cuGraphLaunch(void *graph, void *stream) { return noted(GRAPH_LAUNCH, graph, stream, NULL); }
int cuEventRecord(void *event, void *stream) { return noted(EVENT_RECORD, event, stream, NULL); }
int cuEventQuery(void *event) { return noted(EVENT_QUERY, event, NULL, NULL); }
int cuStreamQuery(void *stream) { return noted(STREAM_QUERY, stream, NULL, NULL); }
int cuStreamWaitEvent(void *stream, void *event, unsigned int flags) { (void)flags; return noted(STREAM_WAIT, stream, event, NULL); }
int cuGraphExecMemcpyNodeSetParams(void *graph, void *node, const Memcpy3D *copy, void *context) {
    (void)context;
    return noted(SET_COPY, graph, node, copy);
}

int cuCtxSetCurrent(void *context) { return noted(SET_CONTEXT, context, NULL, NULL); }

void set_answer(long kind, int status) { answers[kind] = status; }
void hold(int wanted) {
    pthread_mutex_lock(&mutex);
    is_held = wanted;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}
void wait_held(long wanted) { /* until so many launches are held */
    pthread_mutex_lock(&mutex);
    while (held < wanted) pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
}
long call_count(void) { return count; }
const Call *call_at(long i) { return &calls[i]; }
void reset(void) {
    count = 0;
    memset(answers, 0, sizeof answers);
}

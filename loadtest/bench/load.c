/* The load generator of the bench: chat completions from one thread and one epoll, every answer checked.
 *
 *   load --mode closed|open|stream|idle --port P --seconds T [option value]...
 *
 * closed: each of `connections` sends its next request when its answer is there. open: requests are due at random
 * (Poisson) moments, `rate` a second, and latency counts from the moment due. stream: `connections` streams of
 * `tokens` events, begun at `rate` a second and then watched for T seconds. idle: the same, each stream held open after
 * its first event; {"ready": N} is printed when all are there, and the end of stdin ends it.
 * Prints one JSON line: what came during the T seconds after the warm-up, and the CPU seconds that load and every
 * `--watch` process used in just that time, with the time they were ready to run and something else ran (wait).
 */
#include "bench.h"
#include <math.h>

#define WATCHED 64
#define DRAIN_NS 15000000000LL /* how long after the window an answer may still come */
#define ERRORS_MAX 1000        /* more than this and nothing measured would mean anything */
#define BODY_KEPT 1024         /* of each answer, for its check */
#define DONE_TEXT "data: [DONE]\n\n"
#define DONE_LENGTH (sizeof DONE_TEXT - 1)

enum mode { CLOSED, OPEN, STREAM, IDLE };
enum phase { WARMING, MEASURING, DRAINING, ENDED };
enum part { HEAD, SIZED, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, LAST_LINE };

struct conn {
    int fd;
    uint64_t id;                     /* of the request now under way */
    int64_t due_ns;                  /* when it should have been sent */
    size_t sent, left, kept, head_used, events, tail_used;
    uint64_t answers;                /* had on this connection */
    enum part part;
    bool busy, writable_wanted, close_after, newline, first_seen;
    int status;
    char *head, body[BODY_KEPT + 1], tail[DONE_LENGTH];
    struct conn *next_free;
};

struct moment {
    int64_t wall_ns, own_ns, own_wait_ns, watched_ns[WATCHED], watched_wait_ns[WATCHED];
    uint64_t requests, events, hits, core_busy[2], core_steal[2], core_all[2];
};

static enum mode mode = CLOSED;
static int port, connections = 64, tokens = 64, watched_count, cores[2] = {-1, -1};
static size_t body_bytes = 1024;
static uint64_t distinct, next_id = 1;
static double seconds = 2, warmup_s = 1, rate = 1000;
static const char *key = "", *head_style = "plain";
static bool spaced;
static pid_t watched_pid[WATCHED];
static clockid_t watched[WATCHED];

static int poller, timer;
static enum phase phase = WARMING;
static int64_t phase_ends_ns;
static struct moment from, to;
static struct conn *conns, *free_conns;
static char *request;
static size_t request_length, id_at;
static uint64_t requests, events, hits, errors, reconnects, started, finished, due_requests, firsts;
static char first_error[512];
static int64_t next_due_ns;
static size_t waiting_from, waiting_to, latency_count, latency_size;
static int64_t *latencies;
#define WAITING_SIZE 65536
static int64_t waiting_ring[WAITING_SIZE];

/* ---- the request ---- */

static void make_request(void) {
    static const char *words[] = {"measure", "the", "latency", "of", "every", "token", "before", "blaming", "a", "node",
                                  "and", "write", "it", "down", "with", "units", "so", "others", "can", "check"};
    const char *comma = spaced ? ", " : ",", *colon = spaced ? ": " : ":";
    char *start = NULL, *end = NULL, *head = NULL, *auth = NULL;
    bool streams = mode == STREAM || mode == IDLE;
    if (asprintf(&start, "{\"messages\"%1$s[{\"role\"%1$s\"system\"%2$s\"content\"%1$s\"You are a helpful assistant. Answer "
                 "briefly and precisely.\"}%2$s{\"role\"%1$s\"user\"%2$s\"content\"%1$s\"Request ", colon, comma) < 0 ||
        asprintf(&end, "\"}]%2$s\"model\"%1$s\"bench-model\"%2$s\"max_tokens\"%1$s%3$d%4$s%2$s\"temperature\"%1$s0}", colon,
                 comma, tokens, !streams ? "" : spaced ? ", \"stream\": true" : ",\"stream\":true") < 0) die("memory");
    size_t fixed = strlen(start) + ID_DIGITS + strlen(end), filler = body_bytes > fixed ? body_bytes - fixed : 0;
    char *text = must(calloc(1, filler + 32));
    for (size_t used = 0, word = 0; used < filler; word++)  /* words, and now and then an escape, as prompts have them */
        used += sprintf(text + used, "%s%s", words[(word * 7 + word / 20) % 20], word % 17 == 16 ? ".\\n" : " ");
    text[filler] = 0;
    if (filler && text[filler - 1] == '\\') text[filler - 1] = '.';
    if (asprintf(&auth, *key ? "authorization: Bearer %s\r\n" : "%s", key) < 0) die("memory");
    if (asprintf(&head, strcmp(head_style, "openai") ?
                 "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%scontent-type: application/json\r\n"
                 "accept: application/json\r\nuser-agent: bench\r\nContent-Length: %zu\r\n\r\n" :
                 "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept-Encoding: gzip, deflate, br\r\n"
                 "Connection: keep-alive\r\n%saccept: application/json\r\ncontent-type: application/json\r\n"
                 "user-agent: OpenAI/Python 2.8.0\r\nx-stainless-lang: python\r\nx-stainless-package-version: 2.8.0\r\n"
                 "x-stainless-os: Linux\r\nx-stainless-arch: x64\r\nx-stainless-runtime: CPython\r\n"
                 "x-stainless-runtime-version: 3.11.7\r\nx-stainless-async: false\r\nx-stainless-retry-count: 0\r\n"
                 "x-stainless-read-timeout: 600\r\nContent-Length: %zu\r\n\r\n",
                 port, auth, fixed + filler) < 0) die("memory");
    if (asprintf(&request, "%s%s%016d%s%s", head, start, 0, text, end) < 0) die("memory");
    request_length = strlen(request);
    id_at = strlen(head) + strlen(start);
    free(start), free(end), free(head), free(auth), free(text);
}

/* ---- what went wrong ---- */

static void failed(const char *what, const char *detail) {
    if (errors++) return;
    snprintf(first_error, sizeof first_error, "%s %.300s", what, detail);
    for (char *c = first_error; *c; c++) {
        if (*c == '"' || *c == '\\') *c = '\'';
        else if ((unsigned char)*c < ' ') *c = ' ';
    }
}

/* ---- moments: the clocks of everything at once ---- */

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    return clock_gettime(clock, &t) ? -1 : t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* How long the first thread of a process waited for its core; 0 where the kernel does not say. */
static int64_t wait_ns(pid_t pid) {
    char path[64];
    long long ran, waited = 0;
    snprintf(path, sizeof path, "/proc/%d/schedstat", pid);
    FILE *stat = fopen(path, "r");
    if (!stat) return 0;
    if (fscanf(stat, "%lld %lld", &ran, &waited) != 2) waited = 0;
    fclose(stat);
    return waited;
}

/* Ticks each core was busy, taken away by the hypervisor, and all; zeros where there is no /proc/stat. */
static void read_cores(struct moment *m) {
    char line[512];
    FILE *stat = fopen("/proc/stat", "r");
    while (stat && fgets(line, sizeof line, stat)) {
        int core;
        unsigned long long t[8] = {0};
        if (sscanf(line, "cpu%d %llu %llu %llu %llu %llu %llu %llu %llu", &core, t, t + 1, t + 2, t + 3, t + 4, t + 5,
                   t + 6, t + 7) < 8) continue;
        for (int i = 0; i < 2; i++) {
            if (cores[i] != core) continue;
            m->core_busy[i] = t[0] + t[1] + t[2] + t[5] + t[6];
            m->core_steal[i] = t[7];
            m->core_all[i] = m->core_busy[i] + t[3] + t[4] + t[7];
        }
    }
    if (stat) fclose(stat);
}

static void take(struct moment *m) {
    read_cores(m);
    for (int i = 0; i < watched_count; i++) m->watched_wait_ns[i] = wait_ns(watched_pid[i]);
    m->own_wait_ns = wait_ns(getpid());
    for (int i = 0; i < watched_count; i++) m->watched_ns[i] = clock_ns(watched[i]);
    m->own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    m->wall_ns = now_ns();
    m->requests = requests, m->events = events, m->hits = hits;
}

/* ---- connections ---- */

static void watch(struct conn *c, int how, uint32_t wanted) {
    struct epoll_event e = {.events = wanted, .data.ptr = c};
    if (epoll_ctl(poller, how, c->fd, &e)) die("epoll_ctl");
}

static void dial(struct conn *c) {
    struct sockaddr_in address = loopback(port);
    struct timeval patience = {.tv_sec = 5};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->answers = 0;
    c->writable_wanted = false;
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

static void hang_up(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static void write_request(struct conn *c) {
    write_id(request + id_at, c->id);
    ssize_t sent = send(c->fd, request + c->sent, request_length - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) c->sent += sent;      /* an error is met by the read that follows */
    bool wanted = c->sent < request_length && (sent > 0 || errno == EAGAIN);
    if (wanted != c->writable_wanted) watch(c, EPOLL_CTL_MOD, wanted ? EPOLLIN | EPOLLOUT : EPOLLIN);
    c->writable_wanted = wanted;
}

static void send_again(struct conn *c) {
    c->sent = c->kept = c->head_used = c->events = c->tail_used = 0;
    c->part = HEAD;
    c->newline = c->close_after = c->first_seen = false;
    if (c->fd < 0) dial(c);
    write_request(c);
}

static void begin(struct conn *c, int64_t due_ns) {
    uint64_t number = started++;
    c->id = next_id + (distinct ? number % distinct : number);
    c->due_ns = due_ns;
    c->busy = true;
    send_again(c);
}

/* ---- answers ---- */

static void check(struct conn *c) {
    char expected[ID_DIGITS + 16] = "chatcmpl-";
    write_id(expected + 9, c->id);
    c->body[c->kept] = 0;
    if (c->status != 200) {
        char status[32];
        snprintf(status, sizeof status, "status %d", c->status);
        failed(status, c->body);
    } else if (!memmem(c->body, c->kept, expected, 9 + ID_DIGITS)) failed("an answer to another request:", c->body);
    else if (mode == CLOSED || mode == OPEN) {
        if (!c->tail_used || c->tail[c->tail_used - 1] != '}' || !strstr(c->body, "\"usage\"")) failed("a broken answer:", c->body);
    } else {
        char seen[96];
        snprintf(seen, sizeof seen, "%zu of %d events", c->events, tokens + 3);
        if (c->events != (size_t)tokens + 3) failed("a stream ended after", seen);
        else if (c->tail_used != DONE_LENGTH || memcmp(c->tail, DONE_TEXT, DONE_LENGTH)) failed("a stream without [DONE]:", seen);
    }
}

static void start_waiting(struct conn *c) {
    if (waiting_from != waiting_to) begin(c, waiting_ring[waiting_from++ % WAITING_SIZE]);
    else c->next_free = free_conns, free_conns = c;
}

static void answered(struct conn *c) {
    requests++, finished++, c->answers++;
    c->busy = false;
    check(c);
    if (c->close_after) hang_up(c);
    if (mode == CLOSED && phase < DRAINING) begin(c, 0);
    if (mode != OPEN) return;
    if (c->due_ns >= from.wall_ns && phase >= MEASURING && (phase == MEASURING || c->due_ns < to.wall_ns)
        && latency_count < latency_size) latencies[latency_count++] = now_ns() - c->due_ns;
    start_waiting(c);
}

static void count_events(struct conn *c, const char *data, size_t length) {
    const char *at = data, *end = data + length;
    while (at && at < end) {
        if (*at != '\n') { c->newline = false, at = memchr(at, '\n', end - at); continue; }
        if (c->newline) c->events++, events++;
        c->newline = !c->newline, at++;
    }
    if (c->events && !c->first_seen) c->first_seen = true, firsts++;
}

static void take_body(struct conn *c, const char *data, size_t length) {
    if (!length) return;
    if (c->kept < BODY_KEPT) {
        size_t more = length < BODY_KEPT - c->kept ? length : BODY_KEPT - c->kept;
        memcpy(c->body + c->kept, data, more);
        c->kept += more;
    }
    if (mode == STREAM || mode == IDLE) count_events(c, data, length);
    if (length >= DONE_LENGTH) {
        memcpy(c->tail, data + length - DONE_LENGTH, c->tail_used = DONE_LENGTH);
        return;
    }
    size_t old = c->tail_used + length > DONE_LENGTH ? DONE_LENGTH - length : c->tail_used;
    memmove(c->tail, c->tail + c->tail_used - old, old);
    memcpy(c->tail + old, data, length);
    c->tail_used = old + length;
}

static void read_head(struct conn *c, const char *head, size_t length) {
    const char *value;
    c->status = length > 12 ? atoi(head + 9) : 0;
    c->close_after = reads_as(header(head, length, "connection:"), "close");
    if (distinct && reads_as(header(head, length, "x-balancer-cache:"), "hit")) hits++;
    if ((value = header(head, length, "content-length:"))) c->left = strtoul(value, NULL, 10), c->part = SIZED;
    else if (reads_as(header(head, length, "transfer-encoding:"), "chunked")) c->left = 0, c->part = CHUNK_SIZE;
    else c->left = 0, c->part = SIZED, failed("an answer without a length", "");
}

/* The head may come in several reads; what comes before its end is kept. Returns how much of `data` it took. */
static size_t take_head(struct conn *c, const char *data, size_t length) {
    const char *head = data;
    size_t whole = length, before = c->head_used;
    if (before) {
        head = c->head = must(realloc(c->head, before + length));
        memcpy(c->head + before, data, length);
        whole = before + length;
    }
    const char *blank = memmem(head, whole, "\r\n\r\n", 4);
    if (blank) {
        read_head(c, head, blank + 4 - head);
        return blank + 4 - head - before;
    }
    if (!before) memcpy(c->head = must(realloc(c->head, length)), data, length);
    c->head_used = whole;
    return length;
}

static int hex(char digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    digit |= 0x20;
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

static void take_bytes(struct conn *c, const char *data, size_t length) {
    const char *end = data + length;
    while (c->busy && (data < end || (c->part == SIZED && !c->left))) {
        size_t have = end - data, some = c->left < have ? c->left : have;
        switch (c->part) {
        case HEAD: data += take_head(c, data, have); break;
        case SIZED: take_body(c, data, some), data += some;
            if (!(c->left -= some)) answered(c);
            break;
        case CHUNK_SIZE:
            if (hex(*data) >= 0) c->left = c->left * 16 + hex(*data);
            else if (*data == '\n') c->part = c->left ? CHUNK_DATA : LAST_LINE;
            data++;
            break;
        case CHUNK_DATA: take_body(c, data, some), data += some;
            if (!(c->left -= some)) c->part = CHUNK_END;
            break;
        case CHUNK_END: if (*data++ == '\n') c->part = CHUNK_SIZE; break;
        case LAST_LINE: if (*data++ == '\n') answered(c); break;
        }
    }
}

static void broken(struct conn *c, const char *why) {
    bool unanswered = c->busy && c->part == HEAD && !c->head_used && c->answers;
    hang_up(c);
    if (unanswered) { reconnects++, send_again(c); return; }   /* closed between requests: any client sends again */
    if (!c->busy) return;
    failed("connection lost:", why);
    c->busy = false, finished++;
    if (mode == CLOSED && phase < DRAINING && errors < ERRORS_MAX) begin(c, 0);
    if (mode == OPEN && errors < ERRORS_MAX) start_waiting(c);
}

static void receive(struct conn *c) {
    static char shared[READ_BYTES];
    ssize_t got = recv(c->fd, shared, sizeof shared, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) broken(c, got ? strerror(errno) : "end of file");
    else if (c->busy) take_bytes(c, shared, got);
    else failed("bytes nobody asked for:", "");
}

/* ---- when things are due ---- */

static double random_ratio(void) {     /* xorshift with a fixed seed: every run meets the same arrivals */
    static uint64_t state = 88172645463325252ULL;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return ((state >> 11) + 1) / 9007199254740993.0;
}

static void arm(void) {
    struct itimerspec at = {.it_value = {next_due_ns / 1000000000, next_due_ns % 1000000000}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
}

static void start_due(void) {
    uint64_t fired;
    if (read(timer, &fired, sizeof fired) < 0 || phase >= DRAINING) return;
    bool streams = mode != OPEN;
    for (int64_t now = now_ns(); next_due_ns <= now; due_requests++) {
        if (streams && due_requests == (uint64_t)connections) return;
        if (streams) begin(&conns[due_requests], next_due_ns);
        else if (free_conns) {
            struct conn *c = free_conns;
            free_conns = c->next_free;
            begin(c, next_due_ns);
        } else if (waiting_to - waiting_from < WAITING_SIZE) waiting_ring[waiting_to++ % WAITING_SIZE] = next_due_ns;
        else failed("too many requests waiting", "");
        next_due_ns += 1e9 / rate * (streams ? 1 : -log(random_ratio()));
    }
    arm();
}

static void set_off(void) {
    int64_t now = now_ns();
    phase_ends_ns = now + warmup_s * 1e9;
    next_due_ns = now + 1000000;
    if (mode == CLOSED) for (int i = 0; i < connections; i++) begin(&conns[i], 0);
    else arm();
    if (mode != OPEN) return;
    for (int i = 0; i < connections; i++) dial(&conns[i]), start_waiting(&conns[i]);
}

static void advance(void) {
    int64_t now = now_ns();
    bool all_open = (mode != STREAM && mode != IDLE) || firsts >= (uint64_t)connections;
    if (errors > ERRORS_MAX) phase = ENDED;
    if (phase == WARMING && !all_open) phase_ends_ns = now + warmup_s * 1e9;
    if (phase == DRAINING && started == finished && waiting_from == waiting_to) phase = ENDED;
    if (now < phase_ends_ns) return;
    if (phase == WARMING) {
        take(&from);
        phase = MEASURING, phase_ends_ns = from.wall_ns + seconds * 1e9;
    } else if (phase == MEASURING) {
        take(&to);
        phase = DRAINING, phase_ends_ns = to.wall_ns + DRAIN_NS;
    } else if (phase == DRAINING) {
        failed("never answered:", "requests were still open at the end");
        phase = ENDED;
    }
}

/* ---- the report ---- */

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static double quantile_us(double share) {
    return latency_count ? latencies[(size_t)(share * (latency_count - 1) + 0.5)] / 1000.0 : 0;
}

static double core_ratio(uint64_t a, uint64_t b, int i) {
    uint64_t all = to.core_all[i] - from.core_all[i];
    return all ? (double)(b - a) / all : 0;
}

static void report(void) {
    if (latency_count) qsort(latencies, latency_count, sizeof *latencies, by_size);
    printf("{\"wall_s\": %.6f, \"requests\": %lu, \"events\": %lu, \"cache_hits\": %lu, \"errors\": %lu, \"reconnects\": %lu, "
           "\"finished\": %lu, \"first_error\": \"%s\", \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, \"load_cpu_s\": %.6f",
           (to.wall_ns - from.wall_ns) / 1e9, to.requests - from.requests, to.events - from.events, to.hits - from.hits, errors,
           reconnects, finished, first_error, quantile_us(0.5), quantile_us(0.99), quantile_us(1), (to.own_ns - from.own_ns) / 1e9);
    printf(", \"core_busy\": [%.4f, %.4f], \"core_steal\": [%.4f, %.4f], \"watched_cpu_s\": [",
           core_ratio(from.core_busy[0], to.core_busy[0], 0), core_ratio(from.core_busy[1], to.core_busy[1], 1),
           core_ratio(from.core_steal[0], to.core_steal[0], 0), core_ratio(from.core_steal[1], to.core_steal[1], 1));
    for (int i = 0; i < watched_count; i++)
        printf("%s%.6f", i ? ", " : "", from.watched_ns[i] < 0 || to.watched_ns[i] < 0 ? -1 :
               (to.watched_ns[i] - from.watched_ns[i]) / 1e9);
    printf("], \"load_wait_s\": %.6f, \"watched_wait_s\": [", (to.own_wait_ns - from.own_wait_ns) / 1e9);
    for (int i = 0; i < watched_count; i++)
        printf("%s%.6f", i ? ", " : "", (to.watched_wait_ns[i] - from.watched_wait_ns[i]) / 1e9);
    printf("]}\n");
}

static void option(const char *name, const char *value) {
    if (!strcmp(name, "--mode")) mode = *value == 'c' ? CLOSED : *value == 'o' ? OPEN : *value == 's' ? STREAM : IDLE;
    else if (!strcmp(name, "--port")) port = atoi(value);
    else if (!strcmp(name, "--connections")) connections = atoi(value);
    else if (!strcmp(name, "--seconds")) seconds = atof(value);
    else if (!strcmp(name, "--warmup")) warmup_s = atof(value);
    else if (!strcmp(name, "--rate")) rate = atof(value);
    else if (!strcmp(name, "--body-bytes")) body_bytes = atol(value);
    else if (!strcmp(name, "--tokens")) tokens = atoi(value);
    else if (!strcmp(name, "--distinct")) distinct = atol(value);       /* 0: every body is new */
    else if (!strcmp(name, "--first-id")) next_id = atoll(value);
    else if (!strcmp(name, "--separators")) spaced = !strcmp(value, "spaced");
    else if (!strcmp(name, "--key")) key = value;
    else if (!strcmp(name, "--head")) head_style = value;
    else if (!strcmp(name, "--proxy-core")) cores[0] = atoi(value);
    else if (!strcmp(name, "--load-core")) cores[1] = atoi(value);
    else if (!strcmp(name, "--watch") && watched_count < WATCHED) {
        watched_pid[watched_count] = atoi(value);
        if (clock_getcpuclockid(atoi(value), &watched[watched_count++])) die("no such process to watch");
    } else { errno = 0; die(name); }
}

int main(int count, char **words) {
    for (int i = 1; i + 1 < count; i += 2) option(words[i], words[i + 1]);
    settle_in();
    make_request();
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    conns = must(calloc(connections, sizeof *conns));
    for (int i = 0; i < connections; i++) conns[i].fd = -1;
    latency_size = mode == OPEN ? (size_t)(rate * seconds * 2) + 1000 : 0;
    latencies = must(calloc(latency_size + 1, sizeof *latencies));
    struct epoll_event on = {.events = EPOLLIN, .data.ptr = &timer}, ready[EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &on);
    set_off();
    bool told = false;
    while (phase != ENDED) {
        int got = epoll_wait(poller, ready, EVENTS, 5);
        for (int i = 0; i < got; i++) {
            struct conn *c = ready[i].data.ptr;
            if (ready[i].data.ptr == &timer) { start_due(); continue; }
            if (c->fd >= 0 && (ready[i].events & EPOLLOUT)) write_request(c);
            if (c->fd >= 0 && (ready[i].events & ~EPOLLOUT)) receive(c);
        }
        if (mode != IDLE) advance();
        else if (!told && firsts + errors >= (uint64_t)connections) {
            printf("{\"ready\": %lu, \"errors\": %lu, \"first_error\": \"%s\"}\n", firsts, errors, first_error);
            told = true;
            fflush(stdout);
            char byte;
            while (read(0, &byte, 1) > 0) continue;
            return 0;
        }
    }
    report();
    return 0;
}

/* The fast backend of the bench: an OpenAI-like server with fixed answers, one thread, one epoll.
 *
 *   backend --ports N [--interval-us U] [--tick-us T]
 *
 * Listens on N free ports of 127.0.0.1, prints {"ports": [...]} and serves until it is ended. A chat completion is
 * answered with ~600 bytes of JSON; with "stream": true by max_tokens events, one every U microseconds (0: the first
 * event, then silence), the streams' phases spread evenly over a timer of T microseconds (1000: at 20,000 events/s
 * twenty leave together, less of a burst than an engine's step makes). Every answer's id repeats the 16 digits after
 * "Request " in the prompt, so that the load generator can tell a wrong answer.
 */
#include "bench.h"

#define HEAD_LIMIT 65536
#define BODY_LIMIT (64 << 20)
#define SCAN_BYTES 1024 /* a body's settings are looked for this far from both of its ends */

struct conn {
    int fd;
    bool listener, dead, writable_wanted, streaming, usage_wanted, close_after;
    char id[ID_DIGITS];
    int events_left;
    char *in, *out;              /* what came of an unfinished request; what could not be written yet */
    size_t in_used, in_size, needed, out_used;
    struct conn *next, **slot;   /* its neighbours among the streams of one phase, or among the dead */
    struct conn *previous;
};

static int poller, timer;
static long interval_us, tick_us = 1000;
static struct conn **slots, *graveyard;
static size_t slot_count, slot_now, slot_next, streams;

static const char ANSWER_BODY[] =
    "{\"id\":\"chatcmpl-0000000000000000\",\"object\":\"chat.completion\",\"created\":1700000000,"
    "\"model\":\"bench-model\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
    "\"The quick answer is that it depends on the load: measure first, change one thing, and measure again.\","
    "\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"tool_calls\":[],"
    "\"reasoning_content\":null},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],"
    "\"service_tier\":null,\"system_fingerprint\":null,\"usage\":{\"prompt_tokens\":187,\"total_tokens\":210,"
    "\"completion_tokens\":23,\"prompt_tokens_details\":null},\"prompt_logprobs\":null,\"kv_transfer_params\":null}";
static const char MODELS_BODY[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"bench-model\",\"object\":\"model\",\"created\":1700000000,"
    "\"owned_by\":\"vllm\",\"root\":\"bench-model\",\"parent\":null,\"max_model_len\":32768}]}";

#define DATE "date: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\n" DATE
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
#define CHUNK_START "data: {\"id\":\"chatcmpl-0000000000000000\",\"object\":\"chat.completion.chunk\"," \
    "\"created\":1700000000,\"model\":\"bench-model\",\"choices\":["
#define CHUNK(delta, end) CHUNK_START "{\"index\":0,\"delta\":" delta ",\"logprobs\":null," end "}]}\n\n"

struct text { char *bytes; size_t length, id_at; };
static struct text answer, role, token, finish, usage, done;

static struct text text_of(const char *content) {
    struct text made = {must(strdup(content)), strlen(content), 0};
    const char *id = strstr(content, "chatcmpl-");
    if (id) made.id_at = id + 9 - content;
    return made;
}

static struct text chunk_of(const char *content) {
    char *framed = NULL;
    if (asprintf(&framed, "%zx\r\n%s\r\n", strlen(content), content) < 0) die("memory");
    return text_of(framed);
}

static struct text unary_of(const char *status, const char *body) {
    char *whole = NULL;
    if (asprintf(&whole, "HTTP/1.1 %s\r\n" DATE "content-length: %zu\r\ncontent-type: application/json\r\n\r\n%s",
                 status, strlen(body), body) < 0) die("memory");
    return text_of(whole);
}

static size_t put(char *at, struct text *what, const char *id) {
    if (what->id_at) memcpy(what->bytes + what->id_at, id, ID_DIGITS);
    memcpy(at, what->bytes, what->length);
    return what->length;
}

static void watch(struct conn *c, int how, uint32_t events) {
    struct epoll_event e = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, how, c->fd, &e)) die("epoll_ctl");
}

static void arm(bool on) {
    struct itimerspec every = {0};
    if (on) every.it_interval.tv_nsec = every.it_value.tv_nsec = tick_us * 1000;
    timerfd_settime(timer, 0, &every, NULL);
}

static void stream_leave(struct conn *c) {
    if (!c->streaming) return;
    c->streaming = false;
    if (!c->slot) return;
    if (c->previous) c->previous->next = c->next; else *c->slot = c->next;
    if (c->next) c->next->previous = c->previous;
    c->slot = NULL;
    if (--streams == 0) arm(false);
}

/* Closed at once, freed after this batch of events: one of them may still point here. */
static void drop(struct conn *c) {
    if (c->dead) return;
    stream_leave(c);
    close(c->fd);
    c->dead = true;
    c->next = graveyard;
    graveyard = c;
}

static void send_out(struct conn *c, const char *bytes, size_t length) {
    ssize_t sent = 0;
    if (!c->out_used) {
        sent = send(c->fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) { drop(c); return; }
        if (sent < 0) sent = 0;
        if ((size_t)sent == length) return;
    }
    c->out = must(realloc(c->out, c->out_used + length - sent));
    memcpy(c->out + c->out_used, bytes + sent, length - sent);
    c->out_used += length - sent;
    if (!c->writable_wanted) watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    c->writable_wanted = true;
}

/* The connection closes once all is written, if its request asked for that. */
static void end_answer(struct conn *c) {
    if (c->close_after && !c->streaming && !c->out_used) drop(c);
}

static void flush_out(struct conn *c) {
    ssize_t sent = send(c->fd, c->out, c->out_used, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) { if (errno != EAGAIN) drop(c); return; }
    memmove(c->out, c->out + sent, c->out_used -= sent);
    if (c->out_used) return;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
    c->writable_wanted = false;
    end_answer(c);
}

/* The head, the role and the first token leave together, as they do when an engine's first step is done. */
static void stream_begin(struct conn *c, int events) {
    char first[2048];
    size_t length = sizeof STREAM_HEAD - 1;
    memcpy(first, STREAM_HEAD, length);
    length += put(first + length, &role, c->id);
    length += put(first + length, &token, c->id);
    c->events_left = events > 1 ? events - 1 : 0;
    c->streaming = true;
    send_out(c, first, length);
    if (!interval_us || c->dead) return;
    c->slot = &slots[slot_next];
    slot_next = (slot_next + 1) % slot_count;
    c->previous = NULL;
    if ((c->next = *c->slot)) c->next->previous = c;
    *c->slot = c;
    if (streams++ == 0) arm(true);
}

static void stream_step(struct conn *c) {
    char last[2048];
    if (c->events_left-- > 0) {
        memcpy(token.bytes + token.id_at, c->id, ID_DIGITS);
        send_out(c, token.bytes, token.length);
        return;
    }
    stream_leave(c);
    size_t length = put(last, &finish, c->id);
    if (c->usage_wanted) length += put(last + length, &usage, c->id);
    length += put(last + length, &done, c->id);
    send_out(c, last, length);
    end_answer(c);
}

static void tick(void) {
    uint64_t due;
    if (read(timer, &due, sizeof due) != sizeof due) return;
    if (due > slot_count) due = slot_count;   /* so late that events were missed: one each, not a flood */
    while (due--) {
        for (struct conn *c = slots[slot_now], *next; c; c = next) {
            next = c->next;
            stream_step(c);
        }
        slot_now = (slot_now + 1) % slot_count;
    }
}

/* The place after `name` and its colon, or NULL. */
static const char *field(const char *part, size_t length, const char *name) {
    const char *at = memmem(part, length, name, strlen(name)), *end = part + length;
    if (!at) return NULL;
    at += strlen(name);
    while (at < end && (*at == ' ' || *at == ':')) at++;
    return at < end ? at : NULL;
}

static const char *body_field(const char *body, size_t length, const char *name) {
    if (length <= 2 * SCAN_BYTES) return field(body, length, name);
    const char *found = field(body + length - SCAN_BYTES, SCAN_BYTES, name);
    return found ? found : field(body, SCAN_BYTES, name);
}

static bool is_true(const char *value, const char *end) { return value && value + 4 <= end && !memcmp(value, "true", 4); }

static void complete(struct conn *c, const char *body, size_t length) {
    const char *end = body + length, *tokens;
    const char *number = memmem(body, length < SCAN_BYTES ? length : SCAN_BYTES, "Request ", 8);
    if (number && number + 8 + ID_DIGITS <= end) memcpy(c->id, number + 8, ID_DIGITS);
    else memset(c->id, '0', ID_DIGITS);
    if (!is_true(body_field(body, length, "\"stream\""), end)) {
        memcpy(answer.bytes + answer.id_at, c->id, ID_DIGITS);
        send_out(c, answer.bytes, answer.length);
        return;
    }
    c->usage_wanted = is_true(body_field(body, length, "\"include_usage\""), end);
    int events = (tokens = body_field(body, length, "\"max_tokens\"")) ? atoi(tokens) : 16;
    stream_begin(c, events);
}

static void answer_with(struct conn *c, const char *status, const char *body) {
    struct text made = unary_of(status, body);
    send_out(c, made.bytes, made.length);
    free(made.bytes);
}

/* One request from the front of `data`: its length, or 0 while it is not whole (`needed` then says how much is). */
static size_t serve_one(struct conn *c, const char *data, size_t length) {
    const char *blank = memmem(data, length, "\r\n\r\n", 4), *value;
    c->needed = 0;
    if (!blank) {
        if (length > HEAD_LIMIT) drop(c);
        return 0;
    }
    size_t head = blank + 4 - data, body = 0;
    if ((value = header(data, head, "content-length:"))) body = strtoul(value, NULL, 10);
    else if (header(data, head, "transfer-encoding:")) { answer_with(c, "411 Length Required", "{}"); drop(c); return 0; }
    if (body > BODY_LIMIT) { drop(c); return 0; }
    if (length < head + body) { c->needed = head + body; return 0; }
    if (reads_as(header(data, head, "connection:"), "close")) c->close_after = true;
    if (!memcmp(data, "POST /v1/chat/completions ", 26)) complete(c, data + head, body);
    else if (!memcmp(data, "GET /health ", 12)) answer_with(c, "200 OK", "{}");
    else if (!memcmp(data, "GET /v1/models ", 15)) answer_with(c, "200 OK", MODELS_BODY);
    else answer_with(c, "404 Not Found", "{\"detail\":\"Not Found\"}");
    end_answer(c);
    return head + body;
}

static size_t serve(struct conn *c, const char *data, size_t length) {
    size_t used = 0, one;
    while (!c->dead && !c->streaming && used < length && (one = serve_one(c, data + used, length - used))) used += one;
    return used;
}

static void receive(struct conn *c) {
    static char shared[READ_BYTES];
    ssize_t got = recv(c->fd, shared, sizeof shared, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) { drop(c); return; }
    char *data = shared;
    size_t length = got;
    if (c->in_used) {
        if (c->in_used + got > c->in_size) c->in = must(realloc(c->in, c->in_size = c->in_used + got + 65536));
        memcpy(c->in + c->in_used, shared, got);
        data = c->in;
        length = c->in_used += got;
    }
    size_t used = length < c->needed ? 0 : serve(c, data, length), left = length - used;
    if (c->dead || (!left && !c->in_used)) return;
    if (left > c->in_size) c->in = must(realloc(c->in, c->in_size = left + 65536));
    if (left && (used || data == shared)) memmove(c->in, data + used, left);
    c->in_used = left;
}

static void accept_all(struct conn *listener) {
    int fd, on = 1;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct conn *c = must(calloc(1, sizeof *c));
        c->fd = fd;
        watch(c, EPOLL_CTL_ADD, EPOLLIN);
    }
}

static int listen_somewhere(void) {
    struct conn *c = must(calloc(1, sizeof *c));
    struct sockaddr_in address = loopback(0);
    socklen_t size = sizeof address;
    c->listener = true;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0 || bind(c->fd, (struct sockaddr *)&address, size) || listen(c->fd, 4096)) die("listen");
    if (getsockname(c->fd, (struct sockaddr *)&address, &size)) die("getsockname");
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
    return ntohs(address.sin_port);
}

static void write_texts(void) {
    answer = unary_of("200 OK", ANSWER_BODY);
    role = chunk_of(CHUNK("{\"role\":\"assistant\",\"content\":\"\"}", "\"finish_reason\":null"));
    token = chunk_of(CHUNK("{\"content\":\" token\"}", "\"finish_reason\":null"));
    finish = chunk_of(CHUNK("{\"content\":\"\"}", "\"finish_reason\":\"stop\",\"stop_reason\":null"));
    usage = chunk_of(CHUNK_START "],\"usage\":{\"prompt_tokens\":187,\"total_tokens\":210,\"completion_tokens\":23}}\n\n");
    done = text_of("e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
}

int main(int count, char **words) {
    int ports = 1;
    for (int i = 1; i + 1 < count; i += 2) {
        if (!strcmp(words[i], "--ports")) ports = atoi(words[i + 1]);
        else if (!strcmp(words[i], "--interval-us")) interval_us = atol(words[i + 1]);
        else if (!strcmp(words[i], "--tick-us")) tick_us = atol(words[i + 1]);
        else { errno = 0; die(words[i]); }
    }
    settle_in();
    write_texts();
    slot_count = interval_us > tick_us ? interval_us / tick_us : 1;
    slots = must(calloc(slot_count, sizeof *slots));
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event timer_event = {.events = EPOLLIN, .data.ptr = NULL}, ready[EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &timer_event);
    printf("{\"ports\": [");
    for (int i = 0; i < ports; i++) printf("%s%d", i ? ", " : "", listen_somewhere());
    printf("]}\n");
    fflush(stdout);
    for (;;) {
        int got = epoll_wait(poller, ready, EVENTS, -1);
        for (int i = 0; i < got; i++) {
            struct conn *c = ready[i].data.ptr;
            if (!c) tick();
            else if (c->listener) accept_all(c);
            else {
                if (!c->dead && (ready[i].events & EPOLLOUT)) flush_out(c);
                if (!c->dead && (ready[i].events & ~EPOLLOUT)) receive(c);
            }
        }
        for (struct conn *c; (c = graveyard); free(c->in), free(c->out), free(c)) graveyard = c->next;
    }
}

/* What load.c and backend.c share: time, sockets, and the small rules of HTTP/1.1 both need. */
#pragma once
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define ID_DIGITS 16      /* every request carries a number of this width; its answer repeats it */
#define READ_BYTES 262144 /* one read takes at most this much */
#define EVENTS 512        /* epoll events taken at once */

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(1);
}

static inline void *must(void *allocated) {
    if (!allocated) die("memory");
    return allocated;
}

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Dies with the driver, and may open as many sockets as the machine allows. */
static void settle_in(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files;
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static inline void write_id(char *at, uint64_t id) {
    for (int i = ID_DIGITS - 1; i >= 0; i--, id /= 10) at[i] = '0' + id % 10;
}

/* The value of a header (`name` in lower case, with its colon) within a head, or NULL. */
static const char *header(const char *head, size_t length, const char *name) {
    size_t name_length = strlen(name);
    const char *end = head + length, *line = head;
    while ((line = memchr(line, '\n', end - line)) && ++line + name_length < end) {
        if ((*line | 0x20) == *name && !strncasecmp(line, name, name_length)) {
            line += name_length;
            while (*line == ' ') line++;
            return line;
        }
    }
    return NULL;
}

static bool reads_as(const char *value, const char *word) {
    return value && !strncasecmp(value, word, strlen(word));
}

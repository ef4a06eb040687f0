/* What the machine can do: two blocking sockets, one buffer each, whole messages to and fro. Each
   end reads a message to its last byte before it sends one, as the sides do that are compared.

   raw_pingpong server PORT             sends every message back once it has it whole
   raw_pingpong ping PORT BYTES SECONDS prints "count seconds p50_us p99_us"

   A connection begins with the size of its messages (8 bytes). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* What one send is given: a single one of 64 MiB costs a quarter more CPU (measured: 30 messages/s,
   in pieces of 0.5 to 4 MiB 36). Most likely the kernel gives back what was acknowledged only
   between two sends, and its buffer holds more than a second-level cache. */
enum { HUGE_PAGE = 2 << 20, MAX_SAMPLES = 4000000, PIECE = 1 << 20 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static int receive(int sock, char *to, size_t size) {
  while (size) {
    ssize_t got = recv(sock, to, size, 0);
    if (got <= 0) return 0;
    to += got;
    size -= got;
  }
  return 1;
}

static int transmit(int sock, const char *from, size_t size) {
  while (size) {
    ssize_t sent = send(sock, from, size < PIECE ? size : PIECE, 0);
    if (sent <= 0) return 0;
    from += sent;
    size -= sent;
  }
  return 1;
}

static char *new_buffer(size_t size) {
  size_t whole = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  char *buffer = aligned_alloc(HUGE_PAGE, whole);
  madvise(buffer, whole, MADV_HUGEPAGE);
  memset(buffer, 1, size); /* the pages are there before the clock runs */
  return buffer;
}

static struct sockaddr_in loopback(const char *port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

static void send_at_once(int sock) {
  int on = 1;
  setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static void *serve(void *argument) {
  int sock = (int)(intptr_t)argument;
  uint64_t size;
  send_at_once(sock);
  if (receive(sock, (char *)&size, sizeof size)) {
    char *buffer = new_buffer(size);
    while (receive(sock, buffer, size) && transmit(sock, buffer, size)) {
    }
    free(buffer);
  }
  close(sock);
  return NULL;
}

static int run_server(const char *port) {
  int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
  struct sockaddr_in address = loopback(port);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 16)) {
    perror("raw_pingpong");
    return 1;
  }
  for (;;) {
    pthread_t thread;
    int sock = accept(listener, NULL, NULL);
    pthread_create(&thread, NULL, serve, (void *)(intptr_t)sock);
    pthread_detach(thread);
  }
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static int ping(const char *port, uint64_t size, double seconds) {
  struct sockaddr_in address = loopback(port);
  int sock = socket(AF_INET, SOCK_STREAM, 0);
  char *buffer = new_buffer(size);
  double *latencies = malloc(MAX_SAMPLES * sizeof *latencies);
  size_t count = 0;
  if (connect(sock, (void *)&address, sizeof address)) {
    perror("raw_pingpong");
    return 1;
  }
  send_at_once(sock);
  transmit(sock, (char *)&size, sizeof size);
  for (int i = 0; i < 3; i++) transmit(sock, buffer, size), receive(sock, buffer, size);
  double began = now(), last = began;
  while (last < began + seconds && count < MAX_SAMPLES) {
    if (!transmit(sock, buffer, size) || !receive(sock, buffer, size)) return 1;
    double ended = now();
    latencies[count++] = ended - last;
    last = ended;
  }
  qsort(latencies, count, sizeof *latencies, compare);
  printf("%zu %.6f %.2f %.2f\n", count, last - began, latencies[count / 2] * 1e6,
         latencies[count * 99 / 100] * 1e6);
  return 0;
}

int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  if (argc == 3 && !strcmp(argv[1], "server")) return run_server(argv[2]);
  if (argc == 5 && !strcmp(argv[1], "ping")) return ping(argv[2], atoll(argv[3]), atof(argv[4]));
  fputs("usage: raw_pingpong server PORT | ping PORT BYTES SECONDS\n", stderr);
  return 2;
}

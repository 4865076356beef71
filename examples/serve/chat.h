/* chat.h: messages -> tokens, for models whose chat template is ChatML:
 *
 *     <|im_start|>role\n content <|im_end|>\n   for each message, then   <|im_start|>assistant\n
 *
 * with the template's own first message of the system unless the messages begin with one. What people write is never read as control
 * tokens. */
#ifndef SERVE_CHAT_H
#define SERVE_CHAT_H

#include "request.h"

/* Finds out whether the model in the directory has such a template, and its message of the system. */
int chat_open(const char *directory, struct server *server);
/* The "messages" of a request. */
int chat_encode(struct request *request, struct tokens *out);

#endif

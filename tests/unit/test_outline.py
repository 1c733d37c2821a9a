"""What files define: the names that each language gives, from the outside in."""

from collections.abc import Iterable, Iterator
from textwrap import dedent

import pytest

from app.corpus.tree.outline import Definition, outline

SAMPLES = {
    "python": (
        '''
        """Says what."""
        import os

        class Server:
            """Serves."""

            # Waits.
            @property
            def timeout(self) -> int:
                """In seconds: how long a socket that says nothing is waited for until it is closed."""
                return self._timeout or int(os.environ["A_TIMEOUT_THAT_SOMEBODY_HAS_SET"]) or self._of_the_class

            async def handle(self, request: bytes) -> bytes:
                """Answers one request, or, if the other side is gone meanwhile, forgets it without a word."""
                return await self._handlers[request[:1]](request[1:], self.timeout, self._waiting, self._done)

        def main() -> None:
            """Runs a server until somebody stops it, and says in the log what it has done meanwhile."""
            Server().run(until=lambda: os.path.exists("a file that somebody makes who wants it to stop"))
        ''',
        "Server Server.timeout Server.handle main",
    ),
    "javascript": (
        """
        import { x } from "y";

        /** Adds two numbers. */
        export function add(a, b) {
          const sum = a.toBigInt() + b.toBigInt();
          return sum > Number.MAX_SAFE_INTEGER ? sum : Number(sum);
        }

        export const later = async (work) => {
          await new Promise((done) => setTimeout(done, 1000, "a second and not less"));
          return work.after(x).then((result) => result.value, (error) => console.error(error));
        };

        Queue.prototype.push = function (item) {
          this.items[this.end++ % this.items.length] = { item, since: Date.now(), tries: 0 };
          this.waiting.shift()?.(item, this.end, "there is something to do again");
        };

        class Cache extends Map {
          get(key) {
            const found = super.get(key) ?? this.older.get(key) ?? this.oldest.get(key);
            return found && found.until > Date.now() ? found.value : undefined;
          }
        }
        """,
        "add later Queue.prototype.push Cache Cache.get",
    ),
    "typescript": (
        """
        export interface Shape<T> {
          readonly area: number; // in square metres, without what lies below other shapes
          scale(by: number, around: T, keeping: "width" | "height" | "both" | "neither"): Shape<T>;
        }

        namespace Geometry {
          export abstract class Circle implements Shape<Point> {
            @cached(forever)
            grown(by: number): Circle {
              return new Circle(this.centre, this.radius + by, this.colour, this.line, this.filling);
            }
            protected shrink = (by: number): void => {
              this.radius = Math.max(0, this.radius - by); this.changed.fire({ radius: this.radius });
            };
          }
        }

        type Pair<A> = {
          first: A; second: A; together: () => [A, A]; swapped: () => Pair<A>; equal: (other: Pair<A>) => boolean;
        };
        """,
        "Shape Geometry Geometry.Circle Geometry.Circle.grown Geometry.Circle.shrink Pair",
    ),
    "tsx": (
        """
        export function Button({ label, onPress }: Props): JSX.Element {
          const [pressed, setPressed] = useState<boolean>(false);
          return <button className={pressed ? "down" : "up"} onClick={() => { onPress(setPressed); }}>{label}</button>;
        }

        const Field: React.FC<Props> = ({ value, onChange, onBlur, placeholder }) => (
          <input type="text" value={value} onChange={onChange} onBlur={onBlur} placeholder={placeholder} autoFocus />
        );
        """,
        "Button Field",
    ),
    "go": (
        """
        package store

        // Store keeps things.
        type Store[K comparable] struct {
            items map[K]string // what is kept, by its key; nothing in here is older than an hour
            mutex sync.RWMutex // held by who reads or writes items, and by nobody else for any time
        }

        func (s *Store[K]) Get(key K) (string, error) {
            s.mutex.RLock()
            defer s.mutex.RUnlock()
            return s.items[key], fmt.Errorf("there is no %v in a store of %d items", key, len(s.items))
        }

        func Open(path string) *Store[string] {
            log.Printf("opening a store at %s, and making a new one if there is nothing at all", path)
            return &Store[string]{items: make(map[string]string, 1024), mutex: sync.RWMutex{}}
        }
        """,
        "Store Store.Get Open",
    ),
    "rust": (
        """
        use std::fmt;

        /// A point in the plane.
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
        pub struct Point<T> {
            pub x: T, // to the right, in metres, from the lower left corner of the map
            pub y: T, // upwards, in metres, from the lower left corner of the map
        }

        impl<T: fmt::Display> fmt::Display for Point<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a point that is {} to the right and {} up from the lower left", self.x, self.y)
            }
            fn other(&self) -> String {
                format!("the same point, but said in another way: {} and {} and nothing else", self.y, self.x)
            }
        }

        mod inner {
            pub async fn fetch(url: &str) -> Result<String, Error> {
                reqwest::get(url).await?.error_for_status()?.text().await.map_err(|error| Error::Broken(error))
            }
        }
        """,
        "Point Point Point.fmt Point.other inner inner.fetch",
    ),
    "java": (
        """
        package org.example;

        public final class Account {
            private long cents; // never below zero, as nobody lends money to anybody here, or ever will

            public Account(long cents) {
                this.cents = Objects.requireNonNull(cents, "an account has to know how much is in it");
            }

            @Override
            public void withdraw(long amount) throws Broke {
                if (amount > cents) throw new Broke("there are only " + cents + " and " + amount + " are wanted");
                cents -= amount;
            }
        }

        interface Bank {
            Account open(String name, long cents, Currency currency, Locale locale, Instant since, Clock clock);
        }
        """,
        "Account Account.Account Account.withdraw Bank Bank.open",
    ),
    "c": (
        """
        #ifndef LIST_H
        #include <stdlib.h>

        struct node {
            struct node *next; /* the one behind it, or NULL if it is the last one of its list */
            int value;         /* whatever it is that somebody wanted to keep in here for later */
        };

        static struct node *push(struct node *head, int value)
        {
            struct node *made = malloc(sizeof *made); /* never freed by us, it is the caller's */
            *made = (struct node){.next = head, .value = value};
            return made;
        }

        typedef enum {
            RED, GREEN, BLUE, /* as people see them, not as they are mixed by painters or printers */
        } colour;
        #endif
        """,
        "node push colour",
    ),
    "c++": (
        """
        namespace shapes {
        template <typename T>
        class Box : public Shape {
         public:
          T area() const override {
            return width_ * height_; // of the inner side, as the outer one is never seen by anybody
          }
          bool operator==(const Box& other) const {
            return width_ == other.width_ && height_ == other.height_ && depth_ == other.depth_;
          }
         private:
          T width_, height_, depth_; // in millimetres, measured on the inner side at twenty degrees
        };
        }  // namespace shapes

        void Window::resize(int width, int height) {
          geometry_ = Geometry{.width = std::max(width, 1), .height = std::max(height, 1)};
          for (auto& child : children_) child->resized(geometry_, Reason::parent, Clock::now());
        }

        template <typename T>
        bool Pair<T>::operator<(const Pair& other) const {
          return std::tie(first_, second_) < std::tie(other.first_, other.second_);
        }
        """,
        "shapes shapes.Box shapes.Box.area shapes.Box.operator== Window.resize Pair.operator<",
    ),
    "c#": (
        """
        namespace Shop
        {
            public class Basket : IBasket
            {
                public decimal Total { get { return lines.Sum(line => line.Price * line.Count * (1 - line.Off)); } }

                [Obsolete("use Put")]
                public async Task AddAsync(Product product, int count)
                {
                    await store.SaveAsync(new Line(product, count, clock.UtcNow, user.Id, Discount.None));
                }
            }

            public enum State { Open, Paid, Sent, Returned, RefundedInPart, RefundedInFull, LostOnTheWay }
        }
        """,
        "Shop Shop.Basket Shop.Basket.Total Shop.Basket.AddAsync Shop.State",
    ),
    "ruby": (
        """
        module Mail
          class Message < Base
            # Whether it was sent.
            def sent?
              !sent_at.nil? && sent_at <= Time.now.utc && deliveries.any? { |delivery| delivery.done? }
            end

            def self.parse(raw)
              head, body = raw.split("\\r\\n\\r\\n", 2).map { |part| part.force_encoding("ASCII-8BIT") }
              new(head: Head.parse(head), body: Body.parse(body || "", encoding: Encoding::BINARY))
            end
          end
        end
        """,
        "Mail Mail.Message Mail.Message.sent? Mail.Message.parse",
    ),
    "bash": (
        """
        #!/bin/bash
        set -euo pipefail

        # Says how long it took.
        timed() {
            local start=$SECONDS
            "$@" || echo "it failed with exit code $? after $((SECONDS - start)) seconds, see the log" >&2
        }

        function backup {
            tar --create --gzip --file "backup-$(date +%F).tar.gz" --exclude node_modules --exclude .git .
        }
        """,
        "timed backup",
    ),
    "php": (
        """
        <?php
        namespace App\\Http;

        class Controller extends Base
        {
            public function show(Request $request, int $id): Response
            {
                return response()->view('show', ['item' => Item::findOrFail($id), 'user' => $request->user()]);
            }
        }

        trait Logs
        {
            private function log(string $message): void { error_log("[" . static::class . "] " . $message . PHP_EOL); }
        }
        """,
        "Controller Controller.show Logs Logs.log",
    ),
    "markdown": (
        """
        ---
        title: no heading
        ---
        # Guide
        This is about how to begin and how to go on, once you have begun, for those who have done neither so far.

        ## Install C# ##
        There is one command for it, which everybody has, so that there is nothing more to say about it in this place:

        ```
        # no heading
        ```

        Use
        ---
        Once it is there, it runs for as long as you want it to, and says in its log what it has done so far for you.
        """,
        "Guide|Guide > Install C#|Guide > Use",
    ),
    "restructuredtext": (
        """
        =====
        Guide
        =====
        This is about how to begin and how to go on, once you have begun, for those who have done neither so far.

        Install
        -------
        There is one command for it, which everybody has, so that there is nothing more to say about it in this place,
        and so this is the end of it.
        """,
        "Guide|Guide > Install",
    ),
}  # fmt: skip


def flat(definitions: Iterable[Definition]) -> Iterator[Definition]:
    """Each, and then what is in it."""
    for each in definitions:
        yield each
        yield from flat(each.inner)


@pytest.mark.parametrize("language", SAMPLES)
def test_a_symbol_is_what_the_language_calls_it(language: str) -> None:
    """Each definition is found by its name, in the order of the file."""
    text, expected = SAMPLES[language]
    found = flat(outline(language, dedent(text).strip().split("\n")))
    assert [each.symbol for each in found] == expected.split("|" if " > " in expected else " ")

"""PHP hosting: HAProxy in front, nginx for files, nginx and PHP-FPM pairs for programs, sessions shared by all."""

from conpaas.core.service import Engine, Role, ServiceType
from conpaas.services.php.messages import DEFAULT_VERSION, HTTP_PORT, PHP_PORT, SESSIONS_PORT, WEB_PORT, PhpSettings

_EXTENSIONS = ("bcmath", "curl", "gd", "intl", "mbstring", "mysql", "sqlite3", "xml", "zip")  # what applications expect
_PHP_PACKAGES = ("fpm", "cli", *_EXTENSIONS)

SERVICE = ServiceType(
    name="php",
    title="PHP web application",
    description="Hosts a PHP application on as many machines as you like, with sessions that follow its users.",
    icon="globe",
    roles=(
        Role(
            name="proxy",
            title="Load balancer",
            description="Takes all requests and shares them out among those who can answer.",
            minimum=1,
            initial=1,
            ports=(HTTP_PORT,),
        ),
        Role(
            name="web", title="Web server", description="Serves the files of the application.", inner_ports=(WEB_PORT,)
        ),
        Role(name="php", title="PHP back-end", description="Runs the application's programs.", inner_ports=(PHP_PORT,)),
        Role(
            name="sessions",
            title="Session store",
            description="Keeps the users' PHP sessions, in the manager's instance.",
            maximum=1,
            scalable=False,
            inner_ports=(SESSIONS_PORT,),
        ),
    ),
    settings=PhpSettings,
    planner="conpaas.services.php.planner:PhpPlanner",
    agents={
        "proxy": "conpaas.services.php.proxy:ProxyAgent",
        "web": "conpaas.services.php.web:WebAgent",
        "php": "conpaas.services.php.php:PhpAgent",
        "sessions": "conpaas.services.php.sessions:SessionsAgent",
    },
    engines=(
        Engine(program="haproxy", package="haproxy"),
        Engine(program="nginx", package="nginx"),
        Engine(
            program=f"php-fpm{DEFAULT_VERSION}",
            package=" ".join([*(f"php{DEFAULT_VERSION}-{part}" for part in _PHP_PACKAGES), "php-redis"]),
        ),
        Engine(program="valkey-server|redis-server", package="redis-server"),
    ),
    takes_code=True,
    default_code="default_code",
)
